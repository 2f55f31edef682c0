// Stand-in for libcudart: graphs, streams and events; work runs as soon as it is put into a stream.
#include <stdlib.h>
#include <time.h>

#include "runtime.h"

// A graph is the capture that made it, instantiated or not. Captures stay: streams and events may still refer to them.
static Capture* current;  // over all threads, the capture that began last
static _Thread_local enum cudaStreamCaptureMode mode;

bool breaks_capture(void) {
  if (current == NULL || !current->active || !current->global || mode == cudaStreamCaptureModeRelaxed) return false;
  return current->broken = true;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* other) {
  const enum cudaStreamCaptureMode before = mode;
  return mode = *other, *other = before, cudaSuccess;
}

// May the host wait for the stream or an event of this capture? Not during it, and trying invalidates the capture.
static cudaError_t waits(Capture* capture) {
  if (capture == NULL || !capture->active) return cudaSuccess;
  capture->broken = true;
  return finish(cudaErrorStreamCaptureUnsupported);
}

// --- streams ---------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  (void)flags;
  ENTER();
  Stream* s = malloc(sizeof *s);
  *s = (Stream){kStreamMagic, priority, NULL};
  return *stream = (cudaStream_t)s, cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

// Keeps its memory, so that a use after this is an error and not a fault.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if ((uintptr_t)stream <= 2 || !stream_exists(stream)) return finish(cudaErrorInvalidResourceHandle);
  return ((Stream*)stream)->magic = 0, cudaSuccess;
}

#define ENTER_WITH(stream) \
  ENTER();                 \
  if (!stream_exists(stream)) return finish(cudaErrorInvalidResourceHandle)

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER_WITH(stream);
  return waits(stream_capture(stream));
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  ENTER_WITH(stream);
  return waits(stream_capture(stream));
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  ENTER_WITH(stream);
  return *priority = (uintptr_t)stream <= 2 ? 0 : ((Stream*)stream)->priority, cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  ENTER_WITH(stream);
  Capture* capture = stream_capture(stream);
  if (capture != NULL) ++capture->nodes;
  else function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned flags) {
  (void)flags;
  ENTER_WITH(stream);
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

// --- events ----------------------------------------------------------------------------------------------------------

typedef struct {
  double milliseconds;  // of the host's clock
  Capture* capture;
  bool recorded;
} Event;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  (void)flags;
  ENTER();
  return *event = calloc(1, sizeof(Event)), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  ENTER_WITH(stream);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(Event*)event = (Event){1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec, stream_capture(stream), true};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  (void)flags;
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER();
  return waits(((Event*)event)->capture);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  ENTER();
  const Event *a = (Event*)start, *b = (Event*)end;
  if (!a->recorded || !b->recorded) return finish(cudaErrorInvalidResourceHandle);
  return *milliseconds = (float)(b->milliseconds - a->milliseconds), cudaSuccess;
}

// A stream that waits for an event of a capture joins that capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  (void)flags;
  ENTER_WITH(stream);
  Capture* capture = ((Event*)event)->capture;
  if (capture != NULL && capture->active && (uintptr_t)stream > 2) ((Stream*)stream)->capture = capture;
  return cudaSuccess;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode how) {
  ENTER_WITH(stream);
  if ((uintptr_t)stream <= 2 || stream_capture(stream) != NULL) return finish(cudaErrorStreamCaptureUnsupported);
  static _Atomic uint64_t captures;
  Capture* capture = calloc(1, sizeof *capture);
  capture->id = ++captures;
  capture->active = true;
  capture->global = how == cudaStreamCaptureModeGlobal;
  ((Stream*)stream)->capture = current = capture;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  ENTER_WITH(stream);
  Capture* capture = stream_capture(stream);
  if (capture == NULL) return finish(cudaErrorInvalidValue);
  capture->active = false;
  *graph = capture->broken ? NULL : (cudaGraph_t)capture;
  return finish(capture->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, NULL, NULL, NULL, NULL, NULL);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  ENTER_WITH(stream);
  Capture* capture = stream_capture(stream);
  *status = capture == NULL   ? cudaStreamCaptureStatusNone
            : capture->broken ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  if (id != NULL) *id = capture != NULL ? capture->id : 0;
  if (graph != NULL) *graph = (cudaGraph_t)capture;
  if (nodes != NULL) *nodes = NULL;
  if (edges != NULL) *edges = NULL;
  if (count != NULL) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  ENTER();
  if (nodes != NULL) return finish(cudaErrorNotSupported);
  return *count = ((Capture*)graph)->nodes, cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long flags) {
  (void)flags;
  ENTER();
  return *result = (cudaGraphExec_t)graph, cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  ENTER_WITH(stream);
  const Capture* capture = (Capture*)graph;
  return finish(record_graph(capture->nodes, capture->fails));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return (void)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return (void)graph, cudaSuccess; }
