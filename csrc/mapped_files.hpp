// Which bytes of which file a piece of memory is: where files are mapped, two addresses may be one
// memory.
#pragma once

#include <stdint.h>

#include <vector>

namespace fused_adam {

class MappedFiles {
 public:
  // A piece of a file, as a range of numbers that no piece of another file overlaps.
  struct Piece {
    uint64_t begin;
    int64_t bytes;
  };

  // Asks the operating system what is mapped now (Linux; elsewhere nothing is known).
  void refresh();

  // The pieces of files that this memory is, as of the last refresh. only_shared: only where what
  // is written reaches the file.
  std::vector<Piece> pieces(const void* data, int64_t bytes, bool only_shared) const;

 private:
  struct Mapping {
    uintptr_t begin, end;
    uint64_t place;  // of its first byte, as in Piece
    bool shared;
  };
  struct File {
    uint64_t device, inode;
  };
  uint64_t place_of(File file);

  std::vector<Mapping> mappings_;  // by address, as the system lists them
  std::vector<File> files_;        // their index is the upper part of a place
};

}  // namespace fused_adam
