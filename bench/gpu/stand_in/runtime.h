// Shared by the files of the stand-in runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "device.h"

// Ends a call: returns its status, and keeps it for cudaGetLastError() if it is an error.
cudaError_t finish(int status);

// Begins a call that fails on a device with an earlier fault.
#define ENTER() \
  if (device_fault) return finish(device_fault)

// Begins a call that is forbidden during a capture that covers every thread; it invalidates the capture.
#define ENTER_UNSAFE() \
  ENTER();             \
  if (breaks_capture()) return finish(cudaErrorStreamCaptureUnsupported)
bool breaks_capture(void);
