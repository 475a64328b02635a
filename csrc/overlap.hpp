// The memory that a step writes, and whether some other memory overlaps it: at the same addresses,
// or as the same bytes of a file that is mapped twice.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

#include "mapped_files.hpp"

namespace fused_adam {

// A piece of memory. mapped: it may be of a file.
struct Memory {
  const void* data;
  int64_t bytes;
  bool mapped;
};

class WrittenMemory {
 public:
  static constexpr int64_t kNone = -1;

  void clear();

  // owner: any number >= 0. Empty pieces are left out.
  void add(const Memory& memory, int64_t owner);

  // To be called after the last add. The owners of two pieces that overlap, or {kNone, kNone}.
  std::pair<int64_t, int64_t> index();

  // The owner of a piece that overlaps this memory, or kNone. The hint is where the answer stood
  // last time (any number to begin with): arrays that come again, or from the same heap, cost one
  // comparison instead of a search.
  int64_t owner_of_overlap(const Memory& memory, size_t& hint);

  // To be called before the questions of each step: since the last one, files may have been mapped.
  void look_again() { places_are_known_ = false; }

 private:
  class Ranges {
   public:
    void clear() { ranges_.clear(); }
    void add(uint64_t begin, int64_t bytes, int64_t owner);
    std::pair<int64_t, int64_t> index();
    int64_t owner_of_overlap(uint64_t begin, int64_t bytes, size_t& hint) const;

   private:
    struct Range {
      uint64_t begin, end;
      int64_t owner;
    };
    std::vector<Range> ranges_;  // sorted by index()
  };

  // Finds out where all mapped memory is in files, which takes the system 0.2 ms. Returns what
  // index() does.
  std::pair<int64_t, int64_t> find_places();

  Ranges addresses_, places_;
  std::vector<std::pair<Memory, int64_t>> mapped_;  // what may be of a file, and its owner
  MappedFiles files_;
  bool places_are_known_ = false;
};

}  // namespace fused_adam
