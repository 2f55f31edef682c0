// The two buffers of a block in shared memory: one is filled by cp.async while the other is multiplied.
#pragma once

#include "cuda/tiles/platform.h"

namespace mk::cuda {

constexpr int kBuffers = 2;

struct Buffers {
  char* rows;  // of the first buffer; the second follows
  int bytes;   // of one
  int turn = 0;

  // The buffer to fill next. Its copies start after arrived() and are committed as one group.
  MK_DEVICE char* next() {
    char* buffer = rows + turn * bytes;
    turn ^= 1;
    return buffer;
  }

  // All threads: waits for the buffer that was filled last. No thread uses the other one any longer.
  MK_DEVICE const char* arrived() const {
    wait_copies<0>();
    __syncthreads();
    return rows + (turn ^ 1) * bytes;
  }
};

}  // namespace mk::cuda
