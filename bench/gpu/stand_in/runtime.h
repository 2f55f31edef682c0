// What the files of the stand-in runtime share.
#pragma once

#include <cuda_runtime_api.h>

#include "device.h"

// Ends a call: its status, kept for cudaGetLastError() where it is an error.
cudaError_t finish(int status);

// Begins a call that a failed device refuses.
#define ENTER() \
  if (device_fault) return finish(device_fault)

// Begins a call that the thread may not make while a capture runs that concerns every thread; it breaks the capture.
#define ENTER_UNSAFE() \
  ENTER();             \
  if (breaks_capture()) return finish(cudaErrorStreamCaptureUnsupported)
bool breaks_capture(void);
