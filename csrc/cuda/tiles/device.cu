#include "cuda/tiles/device.h"

namespace mk::cuda {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA says: " + cudaGetErrorString(status));
}

void describe(int index, Device& device) {
  int shared = 0;
  check(cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index), "multiprocessors");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "shared memory");
  device.shared = shared;
}

}  // namespace mk::cuda
