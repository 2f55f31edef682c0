// Stand-in for libcudart: registers and records kernels without running them; properties and errors of the device.
#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local cudaError_t last;

cudaError_t finish(int status) {
  if (status != cudaSuccess) last = (cudaError_t)status;
  return (cudaError_t)status;
}

cudaError_t cudaGetLastError(void) {
  const cudaError_t status = cudaPeekAtLastError();
  last = cudaSuccess;
  return status;
}
cudaError_t cudaPeekAtLastError(void) { return device_fault ? (cudaError_t)device_fault : last; }
const char* cudaGetErrorName(cudaError_t error) { return status_name(error); }
const char* cudaGetErrorString(cudaError_t error) { return status_text(error); }

// --- device ----------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return finish(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attr, int device) {
  if (device != 0) return finish(cudaErrorInvalidDevice);
  return *value = device_attribute(attr), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* prop, int device) {
  if (device != 0) return finish(cudaErrorInvalidDevice);
  memset(prop, 0, sizeof *prop);
  strcpy(prop->name, kDeviceName);
  memset(prop->uuid.bytes, 7, sizeof prop->uuid.bytes);
  prop->totalGlobalMem = kMemory;
  prop->major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  prop->minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  prop->multiProcessorCount = kSms;
  prop->sharedMemPerBlock = kSharedBlock;
  prop->sharedMemPerBlockOptin = kSharedOptin;
  prop->sharedMemPerMultiprocessor = kSharedPerSm;
  prop->reservedSharedMemPerBlock = kSharedReserved;
  prop->regsPerBlock = prop->regsPerMultiprocessor = kRegisters;
  prop->warpSize = kWarp;
  prop->maxThreadsPerBlock = kThreadsBlock;
  prop->maxThreadsPerMultiProcessor = kThreadsPerSm;
  prop->maxBlocksPerMultiProcessor = kBlocksPerSm;
  for (int i = 0; i < 3; ++i) {
    prop->maxThreadsDim[i] = device_attribute(cudaDevAttrMaxBlockDimX + i);
    prop->maxGridSize[i] = device_attribute(cudaDevAttrMaxGridDimX + i);
  }
  prop->totalConstMem = (size_t)device_attribute(cudaDevAttrTotalConstantMemory);
  prop->memPitch = (size_t)device_attribute(cudaDevAttrMaxPitch);
  prop->textureAlignment = (size_t)device_attribute(cudaDevAttrTextureAlignment);
  prop->l2CacheSize = device_attribute(cudaDevAttrL2CacheSize);
  prop->memoryBusWidth = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
  prop->asyncEngineCount = device_attribute(cudaDevAttrAsyncEngineCount);
  prop->concurrentKernels = prop->unifiedAddressing = prop->canMapHostMemory = prop->ECCEnabled = 1;
  prop->cooperativeLaunch = prop->clusterLaunch = prop->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  if (device != 0) return finish(cudaErrorInvalidDevice);
  snprintf(id, (size_t)length, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  (void)device, (void)peer;
  return *can = 0, cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  ENTER_UNSAFE();
  return cudaSuccess;
}

cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// The driver's function of that name. Older interfaces are not exported; the newer one has a suffix.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* found) {
  (void)version, (void)flags;
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  char newer[128];
  snprintf(newer, sizeof newer, "%s_v2", symbol);
  *function = driver != NULL ? dlsym(driver, symbol) : NULL;
  if (*function == NULL && driver != NULL) *function = dlsym(driver, newer);
  if (found != NULL) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// Called by code that nvcc generates, before main() and at every <<<>>>. The toolkit declares these for C++ only.
void** __cudaRegisterFatBinary(void* binary) {
  void** handle = malloc(sizeof *handle);
  return *handle = binary, handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { free(handle); }
char __cudaInitModule(void** handle) { return (void)handle, 1; }

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid,
                            void* bid, void* block, void* grid, int* size) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)size;
  function_add(host, name);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  Function* f = function_find(host);
  if (f == NULL) return finish(cudaErrorInvalidDeviceFunction);
  function_alias(f, f);
  return *kernel = (cudaKernel_t)f, cudaSuccess;
}

typedef struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} Configuration;
static _Thread_local Configuration pushed[8];  // a stack, since a launch may stand in the arguments of another
static _Thread_local unsigned depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  if (depth == sizeof pushed / sizeof *pushed) return cudaErrorInvalidConfiguration;
  pushed[depth++] = (Configuration){grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (depth == 0) return finish(cudaErrorInvalidConfiguration);
  const Configuration c = pushed[--depth];
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
  return cudaSuccess;
}

static cudaError_t launch(const void* function, const Launch* l) {
  const CUresult status = record_launch(kRuntime, function, l);
  // The runtime has its own status for a shape that no device accepts.
  const bool shape = (uint64_t)l->block[0] * l->block[1] * l->block[2] > kThreadsBlock || l->grid[0] == 0 ||
                     l->grid[1] == 0 || l->grid[2] == 0 || l->grid[1] > 65535 || l->grid[2] > 65535;
  return finish(status == CUDA_ERROR_INVALID_VALUE && shape ? cudaErrorInvalidConfiguration : (int)status);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  (void)args;
  const Launch l = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, {0, 0, 0}, shared, stream};
  return launch(function, &l);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel((const void*)kernel, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  (void)args;
  const dim3 grid = config->gridDim, block = config->blockDim;
  Launch l = {
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, {0, 0, 0}, config->dynamicSmemBytes, config->stream};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute* a = &config->attrs[i];
    if (a->id == cudaLaunchAttributeClusterDimension) memcpy(l.cluster, &a->val.clusterDim, sizeof l.cluster);
  }
  return launch(function, &l);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  ENTER();
  const Function* f = function_find(function);
  if (f == NULL) return finish(cudaErrorInvalidDeviceFunction);
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = (size_t)f->static_shared;
  attributes->maxDynamicSharedSizeBytes = f->max_dynamic;
  attributes->maxThreadsPerBlock = f->threads;
  attributes->numRegs = f->registers;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute, int value) {
  ENTER();
  Function* f = function_find(function);
  if (f == NULL) return finish(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) f->max_cluster = value ? 2 * kCluster : kCluster;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return finish(function_allow_shared(f, value));
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned flags) {
  (void)flags;
  const Function* f = function_find(function);
  if (f == NULL) return finish(cudaErrorInvalidDeviceFunction);
  return *blocks = function_occupancy(f, threads, shared), cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
