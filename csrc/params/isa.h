// The instruction sets a kernel is compiled for, and the choice between them at run time.
//
// Every CPU kernel is compiled once per instruction set into the namespace mk::<isa>. A header of params/ declares its entry
// points with MK_DECLARE; the binding calls them through MK_CALL, which takes the set that isa() names.
#pragma once

#include <cstdint>

namespace mk {

// avx512bf16 is the code of avx512 that also multiplies pairs of bfloat16.
enum class Isa : int64_t { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The set in use: the fastest one that this processor has, or the one named by MEMKERNELS_CPU_ISA. Throws std::runtime_error when
// that name is unknown or the processor lacks it.
Isa isa();

}  // namespace mk

// MK_DECLARE(result, function, Params): an entry point that takes one struct of parameters. MK_CALL(function, params) runs it.
#if defined(MK_CUDA)
// The kernels of csrc/cuda, on the device and stream of the call: pointers are of the device, and nothing waits for it.
namespace mk::cuda {
struct Device;
}
#define MK_DECLARE(result, function, Params)     \
  namespace mk::cuda {                           \
  result function(const Device&, const Params&); \
  }
#define MK_CALL(function, ...) (mk::cuda::function(mk::Launching().device(), __VA_ARGS__))
#elif defined(MK_HAVE_avx2)
#define MK_DECLARE(result, function, Params) \
  namespace mk::baseline {                   \
  result function(const Params&);            \
  }                                          \
  namespace mk::avx2 {                       \
  result function(const Params&);            \
  }                                          \
  namespace mk::avx512 {                     \
  result function(const Params&);            \
  }
#define MK_CALL(function, ...)                                      \
  (mk::isa() >= mk::Isa::avx512 ? mk::avx512::function(__VA_ARGS__) \
   : mk::isa() == mk::Isa::avx2 ? mk::avx2::function(__VA_ARGS__)   \
                                : mk::baseline::function(__VA_ARGS__))
#else
#define MK_DECLARE(result, function, Params) \
  namespace mk::baseline {                   \
  result function(const Params&);            \
  }
#define MK_CALL(function, ...) (mk::baseline::function(__VA_ARGS__))
#endif
