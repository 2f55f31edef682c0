// One test per family of kernels: inputs of the case, the equation in double, the kernels forward and backward.
#pragma once

#include <map>
#include <string>

#include "grid.h"

namespace native {

using Test = void (*)(const Case&);

// Every family by its name; FAMILY adds one. CMake reads the names off the sources.
inline std::map<std::string, Test>& families() {
  static std::map<std::string, Test> all;
  return all;
}
#define FAMILY(name) [[maybe_unused]] const bool added_##name = families().emplace(#name, name).second;

}  // namespace native
