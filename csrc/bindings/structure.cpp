#include "structure.hpp"

#include <algorithm>
#include <string_view>
#include <unordered_set>

#include "containers.hpp"
#include "text.hpp"

namespace fused_adam {
namespace {

std::string index_text(size_t i) { return "[" + std::to_string(i) + "]"; }

// A list that contains itself must end in RecursionError, not in a crash.
struct RecursionGuard {
  RecursionGuard() {
    if (Py_EnterRecursiveCall(" in nested params") != 0) throw py::error_already_set();
  }
  ~RecursionGuard() { Py_LeaveRecursiveCall(); }
};

bool is_sequence(py::handle tree) { return PyList_Check(tree.ptr()) || PyTuple_Check(tree.ptr()); }

// What can only be walked once, or not be indexed, becomes a list: dict.values(), a generator.
py::object as_sequence(py::handle tree) {
  const bool is_iterable =
      PyIter_Check(tree.ptr()) || PyObject_TypeCheck(tree.ptr(), &PyDictValues_Type);
  return is_iterable ? py::list(py::reinterpret_borrow<py::object>(tree))
                     : py::reinterpret_borrow<py::object>(tree);
}

// Both halves of a surrogate pair, next to each other: JSON, as in a file, makes one character of
// them.
bool has_split_pair(const std::string& exact) {
  const auto is_half = [&](size_t i, char kind) {
    return exact[i] == '\xED' && (exact[i + 1] & '\xF0') == kind;
  };
  for (size_t i = 0; i + 6 <= exact.size(); ++i) {
    if (is_half(i, '\xA0') && is_half(i + 3, '\xB0')) return true;
  }
  return false;
}

// Null where all are different.
const std::string* first_repeated(const std::vector<std::string>& texts) {
  std::unordered_set<std::string_view> seen;
  for (const std::string& text : texts) {
    if (!seen.insert(text).second) return &text;
  }
  return nullptr;
}

}  // namespace

// Where flatten stands: a chain over the stack, rendered only for a message.
struct Structure::Trail {
  const Trail* parent;
  const std::string* root;  // at the top
  py::handle key;           // of a dict
  size_t index;             // of a sequence

  std::string str() const {
    if (parent == nullptr) return *root;
    return parent->str() + (key ? "[" + repr_text(key) + "]" : index_text(index));
  }
};

Structure::Structure(const py::object& params) {
  top_ = build(as_sequence(params), "", "");
  if (!named_) return;
  const bool is_odd = std::any_of(names_.begin(), names_.end(), has_split_pair);
  if (!is_odd && first_repeated(names_) == nullptr) return;
  names_ = paths_;
  if (const std::string* path = first_repeated(paths_)) {
    throw py::value_error("two parameters are at params" + *path +
                          ": their keys are different, but have the same repr, and could not be "
                          "told apart in a checkpoint. Use other keys.");
  }
}

Structure::Node Structure::build(const py::object& tree, const std::string& path,
                                 const std::string& name) {
  const RecursionGuard guard;
  const std::string prefix = name.empty() ? "" : name + ".";
  Node node;
  if (PyDict_Check(tree.ptr())) {
    node.kind = Node::kDict;
    named_ = true;
    // A list of the items, with references of its own: the keys below may run any code.
    const py::object items = py::reinterpret_steal<py::object>(PyMapping_Items(tree.ptr()));
    if (!items) throw py::error_already_set();
    for (size_t i = 0; i < sequence_size(items); ++i) {
      const py::object item = sequence_item(items, i);
      const py::object key = sequence_item(item, 0), value = sequence_item(item, 1);
      node.keys.push_back(key);
      node.children.push_back(
          build(value, path + "[" + repr_text(key) + "]", prefix + exact_text(key)));
    }
  } else if (is_sequence(tree)) {
    node.kind = PyList_Check(tree.ptr()) ? Node::kList : Node::kTuple;
    if (node.kind == Node::kTuple && py::hasattr(tree, "_fields")) {
      node.kind = Node::kNamedTuple;
      node.type = py::type::of(tree);
    }
    for (size_t i = 0; i < sequence_size(tree); ++i) {
      node.children.push_back(
          build(sequence_item(tree, i), path + index_text(i), prefix + std::to_string(i)));
    }
  } else {
    leaves_.push_back(tree);
    paths_.push_back(path);
    names_.push_back(name);
  }
  return node;
}

void Structure::flatten(py::handle tree, const std::string& root,
                        std::vector<py::object>& leaves) const {
  flatten(top_, tree, Trail{nullptr, &root, {}, 0}, leaves);
}

void Structure::flatten(const Node& node, py::handle given, const Trail& trail,
                        std::vector<py::object>& leaves) const {
  if (node.kind == Node::kLeaf) {
    leaves.push_back(py::reinterpret_borrow<py::object>(given));
    return;
  }
  const auto refuse = [&](const char* kind, const std::string& found) {
    throw py::value_error(trail.str() + ": expected a " + kind + " with " +
                          std::to_string(node.children.size()) + " entries, as in params, got " +
                          found + ".");
  };
  const auto type_name = [&] { return std::string(Py_TYPE(given.ptr())->tp_name); };
  if (node.kind == Node::kDict) {
    if (!PyDict_Check(given.ptr())) refuse("dict", type_name());
    for (size_t i = 0; i < node.keys.size(); ++i) {
      const py::object child = dict_item(given, node.keys[i]);
      if (!child) refuse("dict", "one without the key " + repr_text(node.keys[i]));
      flatten(node.children[i], child, Trail{&trail, nullptr, node.keys[i], 0}, leaves);
    }
    if (static_cast<size_t>(PyDict_Size(given.ptr())) != node.keys.size()) {
      refuse("dict", "one with " + std::to_string(PyDict_Size(given.ptr())));
    }
    return;
  }
  const py::object tree = as_sequence(given);
  const char* kind = node.kind == Node::kList ? "list" : "tuple";
  if (!is_sequence(tree)) refuse(kind, type_name());
  if (sequence_size(tree) != node.children.size()) {
    refuse(kind, "one with " + std::to_string(sequence_size(tree)));
  }
  for (size_t i = 0; i < node.children.size(); ++i) {
    flatten(node.children[i], sequence_item(tree, i), Trail{&trail, nullptr, {}, i}, leaves);
  }
}

py::object Structure::unflatten(const std::vector<py::object>& leaves) const {
  if (leaves.size() != size()) {
    throw py::value_error("expected " + std::to_string(size()) + " leaves, got " +
                          std::to_string(leaves.size()) + ".");
  }
  auto leaf = leaves.begin();
  return unflatten(top_, leaf);
}

py::object Structure::unflatten(const Node& node,
                                std::vector<py::object>::const_iterator& leaf) const {
  if (node.kind == Node::kLeaf) return *leaf++;
  if (node.kind == Node::kDict) {
    py::dict dict;
    for (size_t i = 0; i < node.keys.size(); ++i) {
      dict[node.keys[i]] = unflatten(node.children[i], leaf);
    }
    return std::move(dict);
  }
  py::list list;
  for (const Node& child : node.children) list.append(unflatten(child, leaf));
  if (node.kind == Node::kList) return std::move(list);
  py::tuple tuple(list);
  return node.kind == Node::kTuple ? py::object(tuple) : node.type(*tuple);
}

}  // namespace fused_adam
