// Stand-in for libcuda: reads modules and records the launches of their kernels, without running them.
#include <stdlib.h>
#include <string.h>

#include "cubin.h"
#include "device.h"

#define ENTER() \
  if (device_fault) return (CUresult)device_fault

// --- device ----------------------------------------------------------------------------------------------------------

static int context;  // its address is the one context, current on every thread

CUresult cuInit(unsigned flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuDriverGetVersion(int* version) { return *version = kVersion, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return *device = 0, ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  return *value = device_attribute(attribute), CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* result, CUdevice device) {
  ENTER();
  return (void)device, *result = (CUcontext)&context, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return (void)device, *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* result) { return *result = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return (void)current, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* bytes, CUlimit limit) { return (void)limit, *bytes = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t bytes) { return (void)limit, (void)bytes, CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult status, const char** name) { return *name = status_name(status), CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult status, const char** text) { return *text = status_text(status), CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  ENTER();
  Block block;
  if (!memory_find((const void*)address, &block)) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: return *(CUdeviceptr*)value = address, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: return *(int*)value = 0, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT: return *(CUcontext*)value = (CUcontext)&context, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)value = block.kind == kDeviceMemory ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}

// --- modules ---------------------------------------------------------------------------------------------------------

// A module is a copy of its image, and the kernels looked up in it.
typedef struct {
  char* image;
  Function** kernels;
  size_t count;
} Module;

CUresult cuModuleLoadData(CUmodule* result, const void* image) {
  ENTER();
  const CUresult status = cubin_check(image);
  if (status != CUDA_SUCCESS) return status;
  Module* module = calloc(1, sizeof *module);
  const size_t bytes = cubin_bytes(image);
  module->image = memcpy(malloc(bytes), image, bytes);
  record_module();
  return *result = (CUmodule)module, CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* result, const void* image, unsigned count, CUjit_option* options, void** values) {
  (void)count, (void)options, (void)values;
  return cuModuleLoadData(result, image);
}

CUresult cuModuleGetFunction(CUfunction* result, CUmodule handle, const char* name) {
  ENTER();
  Module* module = (Module*)handle;
  Function* f = function_add(NULL, strdup(name));  // the record keeps the name
  module->kernels = realloc(module->kernels, (module->count + 1) * sizeof *module->kernels);
  module->kernels[module->count++] = f;
  if (!cubin_kernel(module->image, f)) return CUDA_ERROR_NOT_FOUND;
  return *result = (CUfunction)f, CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule handle) {
  Module* module = (Module*)handle;
  for (size_t i = 0; i < module->count; ++i) {
    function_drop(module->kernels[i]);
    free(module->kernels[i]);
  }
  free(module->kernels);
  free(module->image);
  free(module);
  return CUDA_SUCCESS;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

#define ENTER_WITH(handle)             \
  ENTER();                             \
  Function* f = function_find(handle); \
  if (f == NULL) return CUDA_ERROR_INVALID_HANDLE

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
  ENTER_WITH(handle);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function_threads(f); break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = f->static_shared; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = f->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = f->max_dynamic; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = 90; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  ENTER_WITH(handle);
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    f->max_cluster = value ? 2 * kCluster : kCluster;
  return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? function_allow_shared(f, value) : CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache config) {
  ENTER_WITH(handle);
  return (void)config, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  // Launchers of Triton and torch have no kernels without parameters.
  if (parameters == NULL && extra == NULL) return CUDA_ERROR_INVALID_VALUE;
  Launch launch = {{config->gridDimX, config->gridDimY, config->gridDimZ},
                   {config->blockDimX, config->blockDimY, config->blockDimZ},
                   {0, 0, 0},
                   config->sharedMemBytes,
                   config->hStream};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute* a = &config->attrs[i];
    if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      memcpy(launch.cluster, &a->value.clusterDim, sizeof launch.cluster);
  }
  return record_launch(kDriver, handle, &launch);
}
CUresult cuLaunchKernel(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
  const CUlaunchConfig config = {x, y, z, bx, by, bz, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, handle, parameters, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void** parameters) {
  return cuLaunchKernel(handle, x, y, z, bx, by, bz, shared, stream, parameters, NULL);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads, size_t shared) {
  ENTER_WITH(handle);
  return *blocks = function_occupancy(f, threads, shared), CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction handle, const CUlaunchConfig* config) {
  ENTER_WITH(handle);
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute* a = &config->attrs[i];
    if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      size = a->value.clusterDim.x * a->value.clusterDim.y * a->value.clusterDim.z;
  }
  *clusters = kSms * function_occupancy(f, (int)config->blockDimX, config->sharedMemBytes) / (int)size;
  return CUDA_SUCCESS;
}

// Checks what a device requires of a tensor map; its bits mean nothing here.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // bytes per element, by its type
  static const unsigned kSpan[] = {0, 32, 64, 128};                          // widest row of a box, by swizzle
  (void)promotion, (void)fill;
  ENTER();
  if ((uintptr_t)map % 64 != 0 || (uintptr_t)address % 16 != 0 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  if ((size_t)type >= sizeof kBytes / sizeof *kBytes) return CUDA_ERROR_NOT_SUPPORTED;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (cuuint64_t)1 << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] == 0 || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank && (strides[i] % 16 != 0 || strides[i] >= (cuuint64_t)1 << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  const unsigned row = box[0] * kBytes[type];
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
    const bool wide = swizzle > 0 && (size_t)swizzle < sizeof kSpan / sizeof *kSpan && row > kSpan[swizzle];
    if (row % 16 != 0 || wide) return CUDA_ERROR_INVALID_VALUE;
  }
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
