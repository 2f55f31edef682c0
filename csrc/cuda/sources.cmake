# The CUDA backend: its kernels, and the bindings compiled for them. Used by CMakeLists.txt and by tests/simt.
# Found: an op whose kernels are csrc/cuda/<op>.cu has its operators from csrc/binding/<op>.cpp; a binding that has a header
# serves others, and is compiled with them.
file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu ${CMAKE_CURRENT_LIST_DIR}/tiles/*.cu)
file(GLOB CUDA_BINDINGS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/../binding/cuda/*.cpp)
file(GLOB bindings CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/../binding/*.cpp)
foreach(binding ${bindings})
  get_filename_component(op ${binding} NAME_WE)
  if(EXISTS ${CMAKE_CURRENT_LIST_DIR}/${op}.cu OR EXISTS ${CMAKE_CURRENT_LIST_DIR}/../binding/${op}.h)
    list(APPEND CUDA_BINDINGS ${binding})
  endif()
endforeach()
