"""The operations that are promised, and how each is called.

An op that is not listed here is unfinished: it may have only its formula, or a kernel for one direction. Tests of the
contract grid and of native operators cover the kernels that it has. Once it is listed here, tests demand the rest: no
gap on the CPU, docstring, page, cost, derivatives, types.
"""

from __future__ import annotations

from memkernels.registration import OPS

SIGNATURES = {
    "address": "(query, keys, *, scale=None, slot_mask=None, slot_range=None, gate='softmax')",
    "softmax_read": "(query, keys, values, *, scale=None, slot_mask=None, slot_range=None, key_scale=None, "
    "value_scale=None, sink=None, return_lse=False)",
    "merge_reads": "(reads, lses)",
    "slot_usage": "(query, keys, lse, *, scale=None, slot_mask=None, slot_range=None)",
    "topk_search": "(query, keys, k, *, scale=None, slot_mask=None, slot_range=None, key_scale=None)",
    "sparse_read": "(values, indices, weights, *, value_scale=None, sparse_grad=False)",
    "topk_read": "(query, keys, values, k, *, scale=None, slot_mask=None, slot_range=None, key_scale=None, "
    "value_scale=None, sink=None, return_slots=False, return_lse=False, sparse_grad=False)",
    "gated_write": "(values, keys, query, write, *, erase=1.0, scale=None, slot_mask=None, token_mask=None, "
    "return_retained=False)",
    "slot_write": "(values, weights, write, *, erase=1.0, token_mask=None)",
}
SIGNATURES["gated_write_"] = SIGNATURES["gated_write"]
SIGNATURES["softmax_write"] = SIGNATURES["softmax_write_"] = SIGNATURES["gated_write"]
SIGNATURES["sparse_write"] = "(values, indices, weights, write, *, erase=1.0, token_mask=None)"
SIGNATURES["sparse_write_"] = SIGNATURES["sparse_write"]
SIGNATURES["slot_write_"] = SIGNATURES["slot_write"]
SIGNATURES["gated_scan"] = "(forget, update, initial=None)"
SIGNATURES["cell_scan"] = "(inputs, weight, initial=None)"
SIGNATURES["memory_scan"] = "(values, keys, read_query, write_query, write, *, scale=None, slot_mask=None, "
SIGNATURES["memory_scan"] += "token_mask=None, read_first=False)"
SIGNATURES["product_key_search"] = "(query, subkeys, k, *, scale=None)"
SIGNATURES["paged_topk_search"] = (
    "(query, keys, pages, k, *, scale=None, slot_mask=None, key_scale=None, best_scores=None, best_slots=None)"
)
SIGNATURES["product_key_read"] = (
    "(query, subkeys, values, k, *, scale=None, value_scale=None, return_slots=False, return_lse=False, "
    "sparse_grad=False)"
)
SIGNATURES["additive_read"] = (
    "(query, keys, values, score_vector, *, slot_mask=None, slot_range=None, return_lse=False)"
)
SIGNATURES["cache_logprobs"] = "(logits, cache_scores, cache_tokens, mix)"
SIGNATURES["cache_nll"] = "(logits, targets, cache_scores, cache_tokens, mix, *, return_stats=False)"
SIGNATURES["ngram_slots"] = (
    "(tokens, sizes, multipliers, *, orders, heads, token_map=None, history=None, first=None, ignore=None, pad=0)"
)
SIGNATURES["gather_rows"] = "(values, indices, *, value_scale=None, block=None, dtype=None, sparse_grad=False)"
SIGNATURES["memory_gate"] = "(hidden, key, value, hidden_weight, key_weight, *, eps, signed_sqrt=True)"
SIGNATURES["selected_scores"] = "(query, keys, indices, *, scale=None, key_scale=None, sparse_grad=False)"
SIGNATURES["selected_read"] = (
    "(query, keys, values, indices, *, scale=None, slot_mask=None, key_scale=None, value_scale=None, "
    "sink=None, return_lse=False, return_weights=False, sparse_grad=False)"
)
SIGNATURES["indexer_search"] = "(query, head_weights, keys, k, *, scale=None, slot_mask=None, slot_range=None)"
# What makes the arguments of an op, in plain Python.
HELPERS = ("causal_range", "odd_multipliers", "packed_range", "prime_sizes")

PROMISED = tuple(name for name, op in OPS.items() if (op.twin_of or name) in SIGNATURES)
