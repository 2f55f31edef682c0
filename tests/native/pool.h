// The driver's side of csrc/cpu/tiles/parallel.h and isa.h, and the faults that it can be told to make.
#pragma once

#include <string>
#include <vector>

#include "params/isa.h"

namespace native {

// The instruction sets that were compiled and that this processor has.
std::vector<mk::Isa> instruction_sets();
const char* name_of(mk::Isa isa);

void use(mk::Isa isa, int threads);
int wanted_threads();

// A fault made on purpose, to see that it is noticed:
//   row       a kernel is told that rows are one element longer than they are
//   scratch   tasks get half of the scratch memory they asked for
//   overflow  a kernel is told of more tokens than an integer can count
//   race      every task is run by two threads at once
//   value     one number of a result is changed
extern std::string fault;

}  // namespace native
