// Shared by the stand-in libraries: one device that looks like an H100, whose memory is the host's, and the record of
// the kernels that would have run on it. Status codes are the driver's; the runtime's have the same numbers.
#pragma once

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
  kSms = 132,
  kSharedBlock = 48 << 10,   // bytes of shared memory of a block by default
  kSharedOptin = 227 << 10,  // bytes that a kernel may opt in to
  kSharedPerSm = 228 << 10,  // bytes per SM; a block takes kSharedReserved more than it requests
  kSharedReserved = 1 << 10,
  kRegisters = 65536,  // per block, and per SM
  kThreadsBlock = 1024,
  kThreadsPerSm = 2048,
  kBlocksPerSm = 32,
  kWarp = 32,
  kCluster = 8,  // blocks of a cluster that need no permission
  kVersion = 13000,
};
// bytes, fewer than a real device has: the host must hold what is written
static const size_t kMemory = (size_t)16 << 30;
static const char kDeviceName[] = "NVIDIA H100 (stand-in)";

// The value of an attribute, with the driver's numbers, which the runtime shares.
int device_attribute(int attribute);

// --- faults ----------------------------------------------------------------------------------------------------------

// The status that every call returns after a kernel failed; else CUDA_SUCCESS.
extern _Atomic int device_fault;

// --- kernels ---------------------------------------------------------------------------------------------------------

typedef struct {
  const char* name;
  int registers, threads;          // per thread; most per block
  int static_shared, max_dynamic;  // bytes per block
  int max_cluster;                 // blocks
} Function;

// Adds a kernel, identified by `key`, or by the result if `key` is null. Returns null if out of memory. `name` must
// stay valid.
Function* function_add(const void* key, const char* name);
void function_alias(const void* key, Function* function);
Function* function_find(const void* key);  // or null
void function_drop(const void* key);

// Sets the dynamic shared memory that launches may request.
CUresult function_allow_shared(Function* function, int bytes);
int function_threads(const Function* function);  // most threads per block that its registers allow
// Blocks per SM.
int function_occupancy(const Function* function, int threads, size_t dynamic_shared);

// --- streams ---------------------------------------------------------------------------------------------------------

// What a stream records from the begin to the end of its capture.
typedef struct {
  uint64_t id;
  size_t nodes;
  bool active, broken, global;
  bool fails;  // it contains a kernel that must fail
} Capture;

typedef struct {
  uint32_t magic;
  int priority;
  Capture* capture;  // the last capture in which the stream took part
} Stream;

enum { kStreamMagic = 0x53747265 };  // a stream that has not been destroyed

// Handles 0 to 2 are the default streams, which capture nothing.
bool stream_exists(const void* stream);
Capture* stream_capture(const void* stream);  // its current capture, or null

// --- the record ------------------------------------------------------------------------------------------------------

typedef enum { kRuntime, kDriver, kGraph } By;

typedef struct {
  unsigned grid[3], block[3], cluster[3];  // a cluster of zeros: none
  size_t shared;                           // bytes of dynamic shared memory
  const void* stream;
} Launch;

// Checks a launch as a device does, and records it.
CUresult record_launch(By by, const void* key, const Launch* launch);
CUresult record_graph(size_t kernels, bool fails);
void record_module(void);

// --- memory ----------------------------------------------------------------------------------------------------------

typedef enum { kDeviceMemory, kHostMemory, kRegistered } Kind;
typedef struct {
  char* start;
  size_t bytes;
  Kind kind;
} Block;

CUresult memory_take(void** result, size_t bytes, Kind kind);
CUresult memory_register(void* start, size_t bytes);  // pins memory of the caller
CUresult memory_drop(void* start);
bool memory_find(const void* address, Block* block);
size_t memory_left(void);

const char* status_name(int status);
const char* status_text(int status);
