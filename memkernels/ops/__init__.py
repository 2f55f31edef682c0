"""The operations. One module per op: contract, reference, declaration, public function."""

from .address import address
from .gated_write import gated_write, gated_write_
from .merge_reads import merge_reads
from .slot_usage import slot_usage
from .slot_write import slot_write, slot_write_
from .softmax_read import softmax_read
from .softmax_write import softmax_write, softmax_write_
from .sparse_read import sparse_read
from .sparse_write import sparse_write, sparse_write_
from .topk_read import topk_read
from .topk_search import topk_search

__all__ = [
    "address",
    "gated_write",
    "gated_write_",
    "merge_reads",
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
