"""The operations. One module per op: contract, reference, declaration, public function."""

from ._hashing import odd_multipliers, prime_sizes
from ._ranges import causal_range, packed_range
from .additive_read import additive_read
from .address import address
from .cache_logprobs import cache_logprobs
from .cache_nll import cache_nll
from .cell_scan import cell_scan
from .gated_scan import gated_scan
from .gated_write import gated_write, gated_write_
from .gather_rows import gather_rows
from .indexer_search import indexer_search
from .memory_gate import memory_gate
from .memory_scan import memory_scan
from .merge_reads import merge_reads
from .ngram_slots import ngram_slots
from .paged_topk_search import paged_topk_search
from .product_key_read import product_key_read
from .product_key_search import product_key_search
from .selected_read import selected_read
from .selected_scores import selected_scores
from .slot_usage import slot_usage
from .slot_write import slot_write, slot_write_
from .softmax_read import softmax_read
from .softmax_write import softmax_write, softmax_write_
from .sparse_read import sparse_read
from .sparse_write import sparse_write, sparse_write_
from .topk_read import topk_read
from .topk_search import topk_search

__all__ = [
    "additive_read",
    "address",
    "cache_logprobs",
    "cache_nll",
    "causal_range",
    "cell_scan",
    "gated_scan",
    "gather_rows",
    "gated_write",
    "gated_write_",
    "indexer_search",
    "memory_gate",
    "memory_scan",
    "merge_reads",
    "ngram_slots",
    "odd_multipliers",
    "packed_range",
    "paged_topk_search",
    "prime_sizes",
    "product_key_read",
    "product_key_search",
    "selected_read",
    "selected_scores",
    "slot_usage",
    "slot_write",
    "slot_write_",
    "softmax_read",
    "softmax_write",
    "softmax_write_",
    "sparse_read",
    "sparse_write",
    "sparse_write_",
    "topk_read",
    "topk_search",
]
