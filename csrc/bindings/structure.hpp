// The structure of params: one array, or lists, tuples and dicts of structures.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

namespace fused_adam {

namespace py = pybind11;

class Structure {
 public:
  // Takes params apart. Containers must be lists, tuples (namedtuples too) or dicts; whatever else
  // there is counts as a leaf and is for others to check.
  explicit Structure(const py::object& params);

  // Appends the leaves of a tree of the same structure, in the order of params. Lists and tuples
  // stand for each other; a dict needs the same keys, in any order. root names the tree in
  // messages.
  void flatten(py::handle tree, const std::string& root, std::vector<py::object>& leaves) const;

  // A tree of this structure with these leaves, taken from begin on.
  py::object unflatten(const std::vector<py::object>& leaves) const;

  size_t size() const { return paths_.size(); }
  const std::vector<py::object>& leaves() const { return leaves_; }
  // "['encoder'][0]": what has to follow params in Python to get at a leaf; "" for a lone array.
  const std::vector<std::string>& paths() const { return paths_; }
  // "encoder.0", or the paths of all leaves where two would share such a name, as in {"a.b": x,
  // "a": {"b": y}}, or one would not survive JSON. No two are equal. To be decoded(): keys may be
  // any text.
  const std::vector<std::string>& names() const { return names_; }
  // Does a dict take part? Only then are the names more than numbers.
  bool named() const { return named_; }

 private:
  struct Node {
    enum Kind { kLeaf, kList, kTuple, kNamedTuple, kDict } kind = kLeaf;
    py::object type;               // of a namedtuple
    std::vector<py::object> keys;  // of a dict, in its order
    std::vector<Node> children;
  };
  struct Trail;

  Node build(const py::object& tree, const std::string& path, const std::string& name);
  void flatten(const Node& node, py::handle tree, const Trail& trail,
               std::vector<py::object>& leaves) const;
  py::object unflatten(const Node& node, std::vector<py::object>::const_iterator& leaf) const;

  Node top_;
  std::vector<py::object> leaves_;
  std::vector<std::string> paths_, names_;
  bool named_ = false;
};

}  // namespace fused_adam
