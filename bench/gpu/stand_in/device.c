// The device: its attributes, kernels, memory, and error messages.
#include "device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int device_attribute(int attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return kThreadsBlock;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return kSharedBlock;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return kWarp;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return kRegisters;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;  // kHz, like the next
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;  // bits
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return kSms;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
    case CU_DEVICE_ATTRIBUTE_ECC_ENABLED: return 1;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return kThreadsPerSm;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: return 1;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return kSharedPerSm;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return kRegisters;
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return kSharedOptin;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return kBlocksPerSm;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return kSharedReserved;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return 1;
    default: return 0;
  }
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// --- kernels: a hash table with open addressing, since torch alone registers tens of thousands -----------------------

typedef struct {
  const void* key;  // null: free; kDropped: deleted
  Function* function;
} Slot;

static const char dropped;
static Slot* slots;
static size_t capacity, used;  // capacity: a power of two

static Slot* slot_of(Slot* table, size_t size, const void* key) {
  size_t i = (size_t)((uint64_t)key * 0x9e3779b97f4a7c15u >> 20) & (size - 1);
  while (table[i].key != NULL && table[i].key != key) i = (i + 1) & (size - 1);
  return &table[i];
}

void function_alias(const void* key, Function* function) {
  pthread_mutex_lock(&lock);
  if (2 * used >= capacity) {
    const size_t size = capacity ? 2 * capacity : 1 << 12;
    Slot* larger = calloc(size, sizeof *larger);
    for (size_t i = 0; i < capacity; ++i) {
      if (slots[i].key != NULL && slots[i].key != &dropped) *slot_of(larger, size, slots[i].key) = slots[i];
    }
    free(slots);
    slots = larger, capacity = size;
  }
  Slot* slot = slot_of(slots, capacity, key);
  used += slot->key == NULL;
  *slot = (Slot){key, function};
  pthread_mutex_unlock(&lock);
}

Function* function_add(const void* key, const char* name) {
  Function* f = malloc(sizeof *f);
  // A binary that is not parsed, as the runtime's are compressed: assume as many registers as let the largest block
  // run.
  *f = (Function){
      .name = name, .registers = 64, .threads = kThreadsBlock, .max_dynamic = kSharedBlock, .max_cluster = kCluster};
  function_alias(key != NULL ? key : f, f);
  return f;
}

Function* function_find(const void* key) {
  pthread_mutex_lock(&lock);
  Function* f = capacity && key != NULL ? slot_of(slots, capacity, key)->function : NULL;
  pthread_mutex_unlock(&lock);
  return f;
}

void function_drop(const void* key) {
  pthread_mutex_lock(&lock);
  Slot* slot = slot_of(slots, capacity, key);
  if (slot->key != NULL) *slot = (Slot){&dropped, NULL};
  pthread_mutex_unlock(&lock);
}

CUresult function_allow_shared(Function* function, int bytes) {
  if (bytes < 0 || bytes + function->static_shared > kSharedOptin) return CUDA_ERROR_INVALID_VALUE;
  function->max_dynamic = bytes;
  return CUDA_SUCCESS;
}

int function_threads(const Function* function) {
  const int threads = kRegisters / ((function->registers + 7) / 8 * 8 * 4 * kWarp) * 4 * kWarp;
  return threads < function->threads ? threads : function->threads;
}

int function_occupancy(const Function* function, int threads, size_t dynamic_shared) {
  // Registers are allocated per warp in units of 256, per block in units of four warps.
  const int warps = (threads + kWarp - 1) / kWarp;
  const int registers = (function->registers + 7) / 8 * 8 * kWarp * ((warps + 3) / 4 * 4);
  const size_t shared = (size_t)function->static_shared + dynamic_shared + kSharedReserved;
  size_t blocks = kBlocksPerSm;
  const size_t limits[] = {(size_t)(kThreadsPerSm / (warps * kWarp)), kSharedPerSm / shared,
                           (size_t)(kRegisters / registers)};
  for (int i = 0; i < 3; ++i) blocks = limits[i] < blocks ? limits[i] : blocks;
  return (int)blocks;
}

// --- streams ---------------------------------------------------------------------------------------------------------

bool stream_exists(const void* stream) {
  return (uintptr_t)stream <= 2 || ((const Stream*)stream)->magic == kStreamMagic;
}

Capture* stream_capture(const void* stream) {
  if ((uintptr_t)stream <= 2) return NULL;
  Capture* capture = ((const Stream*)stream)->capture;
  return capture != NULL && capture->active ? capture : NULL;
}

// --- memory: every block is a mapping of its own, so that it begins as zeros and use after free is a fault -----------

static Block* blocks;  // ordered by address
static size_t count, room, taken;

// The first block that ends after `address`.
static size_t block_behind(const char* address) {
  size_t low = 0, high = count;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (blocks[middle].start + blocks[middle].bytes > address) high = middle;
    else low = middle + 1;
  }
  return low;
}

static void block_insert(Block block) {
  if (count == room) {
    room = room ? 2 * room : 64;
    blocks = realloc(blocks, room * sizeof *blocks);
  }
  const size_t i = block_behind(block.start);
  memmove(&blocks[i + 1], &blocks[i], (count - i) * sizeof *blocks);
  blocks[i] = block;
  ++count;
}

CUresult memory_take(void** result, size_t bytes, Kind kind) {
  *result = NULL;
  if (bytes == 0) return CUDA_SUCCESS;
  bytes = (bytes + 4095) / 4096 * 4096;
  CUresult status = CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  if (kind != kDeviceMemory || bytes <= kMemory - taken) {
    // NORESERVE: untouched pages cost nothing.
    void* start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
      block_insert((Block){start, bytes, kind});
      if (kind == kDeviceMemory) taken += bytes;
      *result = start;
      status = CUDA_SUCCESS;
    }
  }
  pthread_mutex_unlock(&lock);
  return status;
}

CUresult memory_register(void* start, size_t bytes) {
  pthread_mutex_lock(&lock);
  block_insert((Block){start, bytes, kRegistered});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult memory_drop(void* start) {
  if (start == NULL) return CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  const size_t i = block_behind(start);
  const bool found = i < count && blocks[i].start == start;
  if (found) {
    const Block block = blocks[i];
    memmove(&blocks[i], &blocks[i + 1], (--count - i) * sizeof *blocks);
    if (block.kind == kDeviceMemory) taken -= block.bytes;
    if (block.kind != kRegistered) munmap(block.start, block.bytes);
  }
  pthread_mutex_unlock(&lock);
  return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

bool memory_find(const void* address, Block* block) {
  pthread_mutex_lock(&lock);
  const size_t i = block_behind(address);
  const bool found = i < count && blocks[i].start <= (const char*)address;
  if (found) *block = blocks[i];
  pthread_mutex_unlock(&lock);
  return found;
}

size_t memory_left(void) { return kMemory - taken; }

// --- errors ----------------------------------------------------------------------------------------------------------

static const struct {
  int status;
  const char *name, *text;
} errors[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {13, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {200, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {906, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {912, "cudaErrorInvalidClusterSize", "cluster misconfiguration"},
    {999, "cudaErrorUnknown", "unknown error"},
};

static int error_of(int status) {
  const int last = (int)(sizeof errors / sizeof *errors) - 1;
  for (int i = 0; i < last; ++i) {
    if (errors[i].status == status) return i;
  }
  return last;
}
const char* status_name(int status) { return errors[error_of(status)].name; }
const char* status_text(int status) { return errors[error_of(status)].text; }
