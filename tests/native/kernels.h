// One test per family of kernels: inputs of the case, the equation in double, the kernels forward and backward.
#pragma once

#include "grid.h"

namespace native {

void softmax_read(const Case& c);
void additive_read(const Case& c);
void address(const Case& c);
void slot_usage(const Case& c);
void gated_write(const Case& c);
void softmax_write(const Case& c);
void slot_write(const Case& c);
void topk_search(const Case& c);
void topk_read(const Case& c);
void product_key_search(const Case& c);
void product_key_read(const Case& c);
void sparse_read(const Case& c);
void sparse_write(const Case& c);
void merge_reads(const Case& c);
void gated_scan(const Case& c);
void cell_scan(const Case& c);
void memory_scan(const Case& c);
void cache_logprobs(const Case& c);
void cache_nll(const Case& c);

}  // namespace native
