# The CUDA backend: its kernels, and the bindings of csrc compiled for them. Used by CMakeLists.txt and by tests/simt.
set(CUDA_OPS address gated_write merge_reads slot_usage slot_write softmax_read softmax_write sparse_read sparse_write
  topk_read topk_search)
file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
set(CUDA_BINDINGS ${CMAKE_CURRENT_LIST_DIR}/../binding.cpp ${CMAKE_CURRENT_LIST_DIR}/../write.cpp
  ${CMAKE_CURRENT_LIST_DIR}/place.cpp ${CMAKE_CURRENT_LIST_DIR}/library.cpp)
set(bindings ${CUDA_OPS})
list(REMOVE_ITEM bindings softmax_write)  # gated_write.cpp has it
foreach(op ${bindings})
  list(APPEND CUDA_BINDINGS ${CMAKE_CURRENT_LIST_DIR}/../${op}.cpp)
endforeach()
