// The two functions of torch that csrc/binding/cpu/threads.cpp calls, over threads of this program (out_of_memory.cpp).
#pragma once

#include "cpu/tiles/parallel.h"

namespace torch::stable {

uint32_t get_num_threads();
void parallel_for(int64_t begin, int64_t end, int64_t grain, mk::FunctionRef<void(int64_t, int64_t)> body);

}  // namespace torch::stable
