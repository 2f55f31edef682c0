# The kernels: raw pointers only, one object library per instruction set. Sets KERNEL_OBJECTS and ISA_DEFINITIONS.
file(GLOB KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cpu/*.cpp)
# The baseline is the fall-back: it need not be the last word in speed, and the lighter optimiser halves its compile time.
set(ISA_baseline $<$<CONFIG:Release>:-O2> $<$<CONFIG:Release>:-ftree-vectorize>)
set(ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND ISAS avx2 avx512)
  set(ISA_avx2 -march=haswell)
  set(ISA_avx512 -march=skylake-avx512 -mprefer-vector-width=512)
endif()
foreach(isa ${ISAS})
  list(APPEND ISA_DEFINITIONS MK_HAVE_${isa}=1)
endforeach()
foreach(isa ${ISAS})
  add_library(kernels_${isa} OBJECT ${KERNELS})
  target_include_directories(kernels_${isa} PRIVATE ${CMAKE_CURRENT_LIST_DIR})
  target_compile_definitions(kernels_${isa} PRIVATE MK_ISA=${isa} ${ISA_DEFINITIONS})
  # NaN and infinity are part of the contract, so no -ffast-math; contraction to fused multiply-add is wanted.
  target_compile_options(kernels_${isa} PRIVATE ${ISA_${isa}} -ffp-contract=fast -fno-math-errno -fno-trapping-math
    -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)  # the last: false alarms from GCC's own intrinsics
  # What every kernel includes, with the intrinsics and the standard library behind it: a third of the compile time.
  target_precompile_headers(kernels_${isa} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/common/parallel.h
    ${CMAKE_CURRENT_LIST_DIR}/common/scores.h)
  list(APPEND KERNEL_OBJECTS $<TARGET_OBJECTS:kernels_${isa}>)
endforeach()
