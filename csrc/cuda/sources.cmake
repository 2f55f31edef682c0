# The CUDA backend: its kernels and their bindings, for CMakeLists.txt and tests/simt. Bindings are found by name: the
# kernels of csrc/cuda/<op>.cu belong to csrc/binding/<op>.cpp. A binding with a header serves other bindings and is
# compiled with them.
file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu ${CMAKE_CURRENT_LIST_DIR}/tiles/*.cu)
file(GLOB CUDA_BINDINGS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/../binding/cuda/*.cpp)
file(GLOB bindings CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/../binding/*.cpp)
foreach(binding ${bindings})
  get_filename_component(op ${binding} NAME_WE)
  if(EXISTS ${CMAKE_CURRENT_LIST_DIR}/${op}.cu OR EXISTS ${CMAKE_CURRENT_LIST_DIR}/../binding/${op}.h)
    list(APPEND CUDA_BINDINGS ${binding})
  endif()
endforeach()
