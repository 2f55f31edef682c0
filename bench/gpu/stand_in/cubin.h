// What the driver reads of a compiled module.
#pragma once

#include "device.h"

// CUDA_SUCCESS for code that the device can run: an ELF file for CUDA and 9.0.
CUresult cubin_check(const void* image);

// Fills in registers, threads and shared memory of the kernel `function->name`. False: the module has no such kernel.
bool cubin_kernel(const void* image, Function* function);

size_t cubin_bytes(const void* image);
