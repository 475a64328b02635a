#include "mapped_files.hpp"

#include <inttypes.h>
#include <stdio.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace fused_adam {
namespace {

constexpr int kOffsetBits = 44;  // files of 16 TiB, a million of them

}  // namespace

void MappedFiles::refresh() {
  mappings_.clear();
  files_.clear();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    // "7f05ac000000-7f05ac021000 rw-s 00001000 fd:01 1234  /a/file"; the inode is 0 without a file.
    Mapping mapping;
    char shared;
    uint64_t offset, major, minor, inode;
    const int found =
        sscanf(line.c_str(),
               "%" SCNxPTR "-%" SCNxPTR " %*c%*c%*c%c %" SCNx64 " %" SCNx64 ":%" SCNx64 " %" SCNu64,
               &mapping.begin, &mapping.end, &shared, &offset, &major, &minor, &inode);
    if (found != 7 || inode == 0) continue;
    mapping.shared = shared == 's';
    mapping.place = place_of({major << 32 | minor, inode}) + offset;
    mappings_.push_back(mapping);
  }
}

uint64_t MappedFiles::place_of(File file) {
  const auto same = [&](const File& other) {
    return other.device == file.device && other.inode == file.inode;
  };
  const auto found = std::find_if(files_.begin(), files_.end(), same);
  const auto index = static_cast<uint64_t>(found - files_.begin());
  if (found == files_.end()) files_.push_back(file);
  return index << kOffsetBits;
}

std::vector<MappedFiles::Piece> MappedFiles::pieces(const void* data, int64_t bytes,
                                                    bool only_shared) const {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  std::vector<Piece> found;
  for (const Mapping& mapping : mappings_) {
    const uintptr_t first = std::max(begin, mapping.begin), last = std::min(end, mapping.end);
    if (first >= last || (only_shared && !mapping.shared)) continue;
    found.push_back({mapping.place + (first - mapping.begin), static_cast<int64_t>(last - first)});
  }
  return found;
}

}  // namespace fused_adam
