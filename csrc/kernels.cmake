# The kernels: raw pointers only, one object library per instruction set. Sets KERNEL_OBJECTS and ISA_DEFINITIONS.
# MK_BASELINE_ALONE: the baseline set and no other.
file(GLOB KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cpu/*.cpp ${CMAKE_CURRENT_LIST_DIR}/cpu/tiles/*.cpp)
# Each instruction set has the lowest optimisation level that costs no speed, measured in interleaved runs of reads,
# writes and searches. Baseline: -O1 compiles in half the time of -O2 and runs in 0.74-1.08 of its time. AVX2: -O2 with
# loop peeling runs in 0.83-1.03 of the time of -O3. AVX-512 stays at -O3: -O2 takes 1.15 times as long in gated_write
# and in reads with few queries. -O1 leaves small loops rolled and takes 1.4-2 times as long with AVX-512 and with AVX2.
set(ISA_baseline $<$<CONFIG:Release>:-O1>)
set(ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT MK_BASELINE_ALONE)
  list(APPEND ISAS avx2 avx512)
  set(ISA_avx2 -march=haswell
      $<$<CONFIG:Release>:-O2> $<$<CONFIG:Release>:-fpeel-loops> $<$<CONFIG:Release>:-ftree-vectorize>)
  set(ISA_avx512 -march=skylake-avx512 -mprefer-vector-width=512)
endif()
foreach(isa ${ISAS})
  list(APPEND ISA_DEFINITIONS MK_HAVE_${isa}=1)
endforeach()
foreach(isa ${ISAS})
  add_library(kernels_${isa} OBJECT ${KERNELS})
  target_include_directories(kernels_${isa} PRIVATE ${CMAKE_CURRENT_LIST_DIR})
  target_compile_definitions(kernels_${isa} PRIVATE MK_ISA=${isa} ${ISA_DEFINITIONS})
  # NaN and infinity are part of the contract, so no -ffast-math. Contraction to fused multiply-adds is allowed.
  target_compile_options(kernels_${isa} PRIVATE ${ISA_${isa}} -ffp-contract=fast -fno-math-errno -fno-trapping-math
    # The last two: false alarms from GCC's own intrinsics.
    -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized)
  # Headers that every kernel includes, with intrinsics and the standard library: parsing them is a third of the compile
  # time.
  target_precompile_headers(kernels_${isa} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cpu/tiles/parallel.h
    ${CMAKE_CURRENT_LIST_DIR}/cpu/tiles/scores.h)
  list(APPEND KERNEL_OBJECTS $<TARGET_OBJECTS:kernels_${isa}>)
endforeach()
