// What random rows can be had for: the bounds of a gather from memory and of one from a disk.
#pragma once

#include <cstdint>
#include <string>

namespace memkernels::host {

constexpr int64_t kPiece = 64;    // bytes of a row that are written twice
constexpr int64_t kBlock = 4096;  // bytes, to whose multiples O_DIRECT reads are aligned

// Reads rows of `row_bytes` bytes of `table`, prefetched `ahead` rows before they are used, and writes each piece of
// kPiece bytes twice, with non-temporal stores: the traffic of a gather that doubles the width of its numbers, and no
// arithmetic. Each thread, pinned to a core, takes an equal part of the rows.
// out: 2 * row_bytes for each of `count` rows, aligned to kPiece.
// Throws std::invalid_argument for a size that does not fit, or a row that is not in the table.
void random_rows(const char* table, int64_t table_bytes, int64_t row_bytes, const int64_t* rows, int64_t count,
                 char* out, int64_t out_bytes, int threads, int64_t ahead);

struct Reads {
  double seconds = 0;  // from the start of the first thread to the end of the last
  int64_t bytes = 0;
  uint64_t mark = 0;  // XOR of the first 8 bytes of every read
};

// Reads ranges of a file with O_DIRECT: each of the threads takes the next range when it has read one, into a buffer of
// its own that is used again.
// Throws std::invalid_argument for a range that is not in blocks, std::runtime_error where the system refuses, or where
// the file ends within a range.
Reads direct_reads(const std::string& path, const int64_t* offsets, const int64_t* sizes, int64_t count, int threads);

}  // namespace memkernels::host
