#include "overlap.hpp"

#include <algorithm>

namespace fused_adam {

void WrittenMemory::add(const void* data, int64_t bytes, int64_t owner) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) ranges_.push_back({begin, begin + static_cast<uintptr_t>(bytes), owner});
}

std::pair<int64_t, int64_t> WrittenMemory::index() {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges_.size(); ++i) {
    const Range &a = ranges_[i - 1], &b = ranges_[i];
    if (b.begin < a.end) return {std::min(a.owner, b.owner), std::max(a.owner, b.owner)};
  }
  return {kNone, kNone};
}

int64_t WrittenMemory::owner_of_overlap(const void* data, int64_t bytes, size_t& hint) const {
  if (bytes <= 0 || ranges_.empty()) return kNone;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  // next is the first range that ends after begin; it is the only candidate.
  size_t next = std::min(hint, ranges_.size());
  const bool after_previous = next == 0 || ranges_[next - 1].end <= begin;
  const bool before_next = next == ranges_.size() || begin < ranges_[next].end;
  if (!after_previous || !before_next) {
    const auto found = std::upper_bound(ranges_.begin(), ranges_.end(), begin,
                                        [](uintptr_t b, const Range& r) { return b < r.end; });
    next = hint = static_cast<size_t>(found - ranges_.begin());
  }
  return next < ranges_.size() && ranges_[next].begin < end ? ranges_[next].owner : kNone;
}

}  // namespace fused_adam
