// The memory that a step writes, and whether some other memory overlaps it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

namespace fused_adam {

class WrittenMemory {
 public:
  static constexpr int64_t kNone = -1;

  void clear() { ranges_.clear(); }

  // owner: any number >= 0. Empty ranges are left out.
  void add(const void* data, int64_t bytes, int64_t owner);

  // To be called after the last add. The owners of two ranges that overlap, or {kNone, kNone}.
  std::pair<int64_t, int64_t> index();

  // The owner of a range that overlaps these bytes, or kNone. The hint is where the answer stood
  // last time (any number to begin with): arrays that come again, or from the same heap, cost one
  // comparison instead of a search.
  int64_t owner_of_overlap(const void* data, int64_t bytes, size_t& hint) const;

 private:
  struct Range {
    uintptr_t begin, end;
    int64_t owner;
  };
  std::vector<Range> ranges_;  // sorted by index()
};

}  // namespace fused_adam
