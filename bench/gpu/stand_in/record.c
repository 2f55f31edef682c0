// The record of launches, read by ctypes through stand_in_*(), and the checks of a device before it runs a kernel.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

// Entries beyond these are counted but not kept. A static array: recording is an addition and a few stores.
enum { kKept = 1 << 20 };
enum { kNoFunction = 98 };  // the runtime's status; the driver has none for it

typedef struct {
  const char* name;
  unsigned grid[3], block[3];
  unsigned shared;
  uint8_t by;
  bool captured;
} Entry;

static Entry entries[kKept];
static _Atomic uint64_t launches, modules;

_Atomic int device_fault;
static char failing[256];  // kernels whose name contains this text fail; empty: none

static void record(By by, const char* name, const unsigned* grid, const unsigned* block, size_t shared, bool captured) {
  const uint64_t i = launches++;
  if (i >= kKept) return;
  Entry* e = &entries[i];
  e->name = name;
  memcpy(e->grid, grid, sizeof e->grid);
  memcpy(e->block, block, sizeof e->block);
  e->shared = (unsigned)shared;
  e->by = (uint8_t)by;
  e->captured = captured;
}

static CUresult check(const Function* f, const Launch* l) {
  static const unsigned most_grid[3] = {0x7fffffff, 65535, 65535}, most_block[3] = {1024, 1024, 64};
  uint64_t threads = 1, cluster = 1;
  for (int i = 0; i < 3; ++i) {
    if (l->grid[i] == 0 || l->grid[i] > most_grid[i] || l->block[i] == 0 || l->block[i] > most_block[i]) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    threads *= l->block[i];
    if (l->cluster[i] == 0) continue;
    if (l->grid[i] % l->cluster[i] != 0) return CUDA_ERROR_INVALID_VALUE;
    cluster *= l->cluster[i];
  }
  if (threads > (uint64_t)f->threads || l->shared > (size_t)f->max_dynamic) return CUDA_ERROR_INVALID_VALUE;
  if (cluster > (uint64_t)f->max_cluster) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  return function_occupancy(f, (int)threads, l->shared) > 0 ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
}

CUresult record_launch(By by, const void* key, const Launch* launch) {
  if (device_fault) return device_fault;
  const Function* f = function_find(key);
  if (f == NULL) return by == kRuntime ? (CUresult)kNoFunction : CUDA_ERROR_INVALID_HANDLE;
  if (!stream_exists(launch->stream)) return CUDA_ERROR_INVALID_HANDLE;
  const CUresult status = check(f, launch);
  if (status != CUDA_SUCCESS) return status;
  Capture* capture = stream_capture(launch->stream);
  record(by, f->name, launch->grid, launch->block, launch->shared, capture != NULL);
  const bool fails = failing[0] && strstr(f->name, failing) != NULL;
  if (capture != NULL) {
    ++capture->nodes;
    capture->fails |= fails;
  } else if (fails) {
    device_fault = CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  return CUDA_SUCCESS;
}

CUresult record_graph(size_t nodes, bool fails) {
  if (device_fault) return device_fault;
  const unsigned grid[3] = {(unsigned)nodes, 1, 1}, block[3] = {1, 1, 1};
  record(kGraph, "graph", grid, block, 0, false);
  if (fails) device_fault = CUDA_ERROR_ILLEGAL_ADDRESS;
  return CUDA_SUCCESS;
}

void record_module(void) { ++modules; }

// --- for ctypes ------------------------------------------------------------------------------------------------------

// Kernels and graphs launched since the last reset, and modules loaded by the driver.
uint64_t stand_in_launches(void) { return launches; }
uint64_t stand_in_modules(void) { return modules; }

void stand_in_reset(void) { launches = modules = 0; }

// The next launch of a kernel with `text` in its name fails like an illegal memory access: every later call returns
// 700. Null: no kernel fails, and the device works again, which a real one does not within a process.
void stand_in_fail(const char* text) {
  snprintf(failing, sizeof failing, "%s", text != NULL ? text : "");
  if (text == NULL) device_fault = CUDA_SUCCESS;
}

// Appends the launches to a file, one line of JSON each. Returns 0 on success.
int stand_in_write(const char* path) {
  static const char* const kBy[] = {"runtime", "driver", "graph"};
  FILE* file = fopen(path, "a");
  if (file == NULL) return 1;
  const uint64_t count = launches < kKept ? launches : kKept;
  for (uint64_t i = 0; i < count; ++i) {
    const Entry* e = &entries[i];
    fprintf(file,
            "{\"by\": \"%s\", \"name\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, "
            "\"captured\": %s}\n",
            kBy[e->by], e->name, e->grid[0], e->grid[1], e->grid[2], e->block[0], e->block[1], e->block[2], e->shared,
            e->captured ? "true" : "false");
  }
  return fclose(file) != 0;
}

// Configures a process by its environment: which kernel fails, and where the record goes when the process ends.
__attribute__((constructor)) static void begin(void) {
  const char* text = getenv("STAND_IN_FAIL");
  if (text != NULL) stand_in_fail(text);
}
__attribute__((destructor)) static void end(void) {
  const char* path = getenv("STAND_IN_LOG");
  if (path != NULL) stand_in_write(path);
}
