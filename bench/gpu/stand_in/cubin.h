// Reads compiled modules for the driver.
#pragma once

#include "device.h"

// CUDA_SUCCESS if the device can run this code: an ELF file for CUDA and compute capability 9.0.
CUresult cubin_check(const void* image);

// Fills in registers, threads and shared memory of the kernel `function->name`. False if the module has no such kernel.
bool cubin_kernel(const void* image, Function* function);

size_t cubin_bytes(const void* image);
