#include "overlap.hpp"

#include <algorithm>

namespace fused_adam {
namespace {

uint64_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

}  // namespace

void WrittenMemory::clear() {
  addresses_.clear();
  mapped_.clear();
  look_again();
}

void WrittenMemory::add(const Memory& memory, int64_t owner) {
  addresses_.add(address(memory.data), memory.bytes, owner);
  if (memory.mapped) mapped_.emplace_back(memory, owner);
}

std::pair<int64_t, int64_t> WrittenMemory::index() {
  const auto found = addresses_.index();
  return found.first != kNone || mapped_.size() < 2 ? found : find_places();
}

int64_t WrittenMemory::owner_of_overlap(const Memory& memory, size_t& hint) {
  const int64_t owner = addresses_.owner_of_overlap(address(memory.data), memory.bytes, hint);
  if (owner != kNone || !memory.mapped || mapped_.empty()) return owner;
  if (!places_are_known_) find_places();
  for (const auto& piece : files_.pieces(memory.data, memory.bytes, false)) {
    size_t anywhere = 0;
    const int64_t found = places_.owner_of_overlap(piece.begin, piece.bytes, anywhere);
    if (found != kNone) return found;
  }
  return kNone;
}

std::pair<int64_t, int64_t> WrittenMemory::find_places() {
  files_.refresh();
  places_.clear();
  for (const auto& [memory, owner] : mapped_) {
    for (const auto& piece : files_.pieces(memory.data, memory.bytes, true)) {
      places_.add(piece.begin, piece.bytes, owner);
    }
  }
  places_are_known_ = true;
  return places_.index();
}

void WrittenMemory::Ranges::add(uint64_t begin, int64_t bytes, int64_t owner) {
  if (bytes > 0) ranges_.push_back({begin, begin + static_cast<uint64_t>(bytes), owner});
}

std::pair<int64_t, int64_t> WrittenMemory::Ranges::index() {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges_.size(); ++i) {
    const Range &a = ranges_[i - 1], &b = ranges_[i];
    if (b.begin < a.end) return {std::min(a.owner, b.owner), std::max(a.owner, b.owner)};
  }
  return {kNone, kNone};
}

int64_t WrittenMemory::Ranges::owner_of_overlap(uint64_t begin, int64_t bytes, size_t& hint) const {
  if (bytes <= 0 || ranges_.empty()) return kNone;
  const uint64_t end = begin + static_cast<uint64_t>(bytes);
  // next is the first range that ends after begin; it is the only candidate.
  size_t next = std::min(hint, ranges_.size());
  const bool after_previous = next == 0 || ranges_[next - 1].end <= begin;
  const bool before_next = next == ranges_.size() || begin < ranges_[next].end;
  if (!after_previous || !before_next) {
    const auto found = std::upper_bound(ranges_.begin(), ranges_.end(), begin,
                                        [](uint64_t b, const Range& r) { return b < r.end; });
    next = hint = static_cast<size_t>(found - ranges_.begin());
  }
  return next < ranges_.size() && ranges_[next].begin < end ? ranges_[next].owner : kNone;
}

}  // namespace fused_adam
