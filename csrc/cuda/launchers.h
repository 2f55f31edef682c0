// The entry points of the CUDA kernels: parameters as for the CPU kernels, on the device and stream of the call. Pointers are of
// the device; nothing waits for it. Each <op>.cu says what it does.
#pragma once

#include "cpu/address.h"
#include "cpu/gated_write.h"
#include "cpu/merge_reads.h"
#include "cpu/slot_usage.h"
#include "cpu/softmax_read.h"
#include "cpu/sparse_read.h"
#include "cpu/sparse_write.h"
#include "cpu/topk_read.h"
#include "cpu/topk_search.h"
#include "cuda/device.h"

namespace mk::cuda {

void softmax_read(const Device&, const SoftmaxRead&);
void softmax_read_backward(const Device&, const SoftmaxReadBackward&);
void sparse_read(const Device&, const SparseRead&);
void sparse_read_backward(const Device&, const SparseReadBackward&);
void topk_search(const Device&, const TopkSearch&);
void topk_search_backward(const Device&, const TopkSearchBackward&);
void topk_read(const Device&, const TopkRead&);
void topk_read_backward(const Device&, const TopkReadBackward&);
void address(const Device&, const Address&);
void address_backward(const Device&, const AddressBackward&);
void slot_usage(const Device&, const SlotUsage&);
void slot_usage_backward(const Device&, const SlotUsageBackward&);
void merge_reads(const Device&, const MergeReads&);
void merge_reads_backward(const Device&, const MergeReadsBackward&);
void gated_write(const Device&, const GatedWrite&);
void gated_write_scan(const Device&, const GatedWrite&);
void gated_write_backward(const Device&, const GatedWriteBackward&);
void gated_write_scan_backward(const Device&, const GatedWriteBackward&);
void sparse_write(const Device&, const SparseWrite&);
void sparse_write_backward(const Device&, const SparseWriteBackward&);

}  // namespace mk::cuda
