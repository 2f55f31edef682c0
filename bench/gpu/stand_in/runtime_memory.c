// Stand-in for libcudart: the device's memory is the host's. Copies and fills run at once, unless captured.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

cudaError_t cudaMalloc(void** result, size_t bytes) {
  ENTER_UNSAFE();
  return finish(memory_take(result, bytes, kDeviceMemory));
}
cudaError_t cudaMallocAsync(void** result, size_t bytes, cudaStream_t stream) {
  (void)stream;
  ENTER();
  return finish(memory_take(result, bytes, kDeviceMemory));
}
cudaError_t cudaFree(void* start) {
  ENTER_UNSAFE();
  return finish(memory_drop(start));
}
cudaError_t cudaFreeAsync(void* start, cudaStream_t stream) {
  (void)stream;
  ENTER();
  return finish(memory_drop(start));
}
cudaError_t cudaHostAlloc(void** result, size_t bytes, unsigned flags) {
  (void)flags;
  ENTER_UNSAFE();
  return finish(memory_take(result, bytes, kHostMemory));
}
cudaError_t cudaFreeHost(void* start) {
  ENTER();
  return finish(memory_drop(start));
}
cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned flags) {
  (void)flags;
  ENTER();
  return finish(memory_register(start, bytes));
}
cudaError_t cudaHostUnregister(void* start) {
  ENTER();
  return finish(memory_drop(start));
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  ENTER();
  return *free = memory_left(), *total = kMemory, cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* address) {
  ENTER();
  Block block;
  memset(attributes, 0, sizeof *attributes);
  if (!memory_find(address, &block)) return attributes->device = -2, cudaSuccess;
  attributes->type = block.kind == kDeviceMemory ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->devicePointer = (void*)address;
  attributes->hostPointer = block.kind == kDeviceMemory ? NULL : (void*)address;
  return cudaSuccess;
}

// --- copies and fills ------------------------------------------------------------------------------------------------

// Begins a copy or a fill in a stream. If the stream captures, it becomes a node of the graph and does not run.
#define ENTER_ON(stream)                                                     \
  ENTER();                                                                   \
  if (!stream_exists(stream)) return finish(cudaErrorInvalidResourceHandle); \
  Capture* capture = stream_capture(stream);                                 \
  if (capture != NULL) return ++capture->nodes, cudaSuccess

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)kind;
  ENTER_ON(stream);
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t bytes,
                                cudaStream_t stream) {
  (void)to_device, (void)from_device;
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)kind;
  ENTER_ON(stream);
  for (size_t i = 0; i < height; ++i) memmove((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  ENTER_ON(stream);
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  ENTER_UNSAFE();
  return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  ENTER_UNSAFE();
  return cudaMemsetAsync(to, value, bytes, NULL);
}

// --- variables of the device -----------------------------------------------------------------------------------------

typedef struct Variable {
  const void* host;
  size_t bytes;
  void* memory;  // allocated at the first use
  struct Variable* next;
} Variable;
static Variable* variables;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int ext, size_t bytes, int constant,
                       int global) {
  (void)handle, (void)device, (void)name, (void)ext, (void)constant, (void)global;
  Variable* v = malloc(sizeof *v);
  pthread_mutex_lock(&lock);
  *v = (Variable){host, bytes, NULL, variables};
  variables = v;
  pthread_mutex_unlock(&lock);
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  ENTER();
  int status = cudaErrorInvalidSymbol;
  pthread_mutex_lock(&lock);
  for (Variable* v = variables; v != NULL; v = v->next) {
    if (v->host != symbol) continue;
    status = v->memory == NULL ? (int)memory_take(&v->memory, v->bytes, kDeviceMemory) : cudaSuccess;
    *address = v->memory;
    break;
  }
  pthread_mutex_unlock(&lock);
  return finish(status);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  void* address;
  const cudaError_t status = cudaGetSymbolAddress(&address, symbol);
  return status == cudaSuccess ? cudaMemcpy((char*)address + offset, from, bytes, kind) : status;
}
