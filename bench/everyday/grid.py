"""The cases, by op: one line each, sizes and then words (:data:`bench.everyday.row.WORDS`)."""

from __future__ import annotations

from .row import Row, parse

GRID = {
    "address": """
        T=1 N=256 K=64
        T=1 N=4096 K=64
        B=32 T=1 N=256 K=64
        B=32 T=1 N=1024 K=64 shared
        T=128 N=1024 K=64 both compile
        T=512 N=256 K=64 both
        T=1024 N=2048 K=64 compile
        T=256 N=1024 K=128 mask
        B=4 H=8 T=128 N=128 K=32 both
        T=256 N=512 K=64 sigmoid both
        T=256 N=1024 K=64 bfloat16
    """,
    "softmax_read": """
        T=1 N=16 KV=16
        T=1 N=256 KV=64 both
        T=1 N=4096 KV=64
        T=1 N=2^16 KV=128
        T=1 N=2^18 KV=64
        T=1 N=2^16 KV=128 bfloat16
        T=16 N=64 KV=64 both
        T=16 N=4096 KV=64
        T=64 N=256 KV=8
        B=32 T=1 N=512 KV=64 compile
        B=32 T=1 N=4096 KV=64 shared
        B=8 H=8 T=1 N=1024 KV=64
        B=4 H=8 T=1 N=2048 KV=128 mask
        B=8 H=8 T=1 N=1024 KV=64 by-head
        T=1024 N=64 KV=64 both compile
        T=256 N=256 KV=128 both
        T=512 N=1024 KV=64 both
        B=4 H=8 T=128 N=128 KV=64 both
        B=2 H=4 T=512 N=512 KV=64 bias
        B=4 T=128 N=1024 KV=64 shared both
        T=1024 N=4096 KV=64 step
        T=4096 N=512 K=32 V=128
        T=512 N=1024 KV=256
        T=512 N=1024 KV=64 bfloat16 both
        B=4 H=8 T=256 N=256 KV=64 causal both
        T=2048 N=2048 KV=64 causal both
        T=2048 N=2048 KV=64 causal=128
        H=8 T=1 N=2048 KV=64 causal
    """,
    "topk_search": """
        T=1 N=4096 K=64 k=16
        T=1 N=2^18 K=64 k=32
        B=32 T=1 N=4096 K=64 k=8
        T=128 N=4096 K=64 k=32 both compile
        T=256 N=65536 K=64 k=32
        T=64 N=16384 K=128 k=100 mask
        T=64 N=4096 K=64 k=32 bfloat16
        T=256 N=4096 K=64 k=32 causal
    """,
    "topk_read": """
        T=1 N=4096 KV=64 k=16
        T=1 N=2^18 KV=64 k=32
        B=32 T=1 N=1024 KV=64 k=16
        B=4 H=8 T=1 N=4096 KV=64 k=32
        T=128 N=4096 KV=64 k=32 both compile
        T=256 N=65536 KV=64 k=32
        T=512 N=1024 KV=64 k=8 both
        T=64 N=4096 KV=64 k=32 bfloat16
    """,
    "sparse_read": """
        T=1 N=4096 V=64 k=32 cached
        T=32 N=4096 V=64 k=32 cached
        T=256 N=4096 V=64 k=32 cached both compile
        T=1024 N=4096 V=128 k=8 cached compile
        T=1 N=2^18 V=256 k=32
        T=256 N=2^18 V=64 k=32 both
        T=1024 N=2^18 V=256 k=32
        T=1024 N=2^18 V=256 k=32 bfloat16
        B=8 T=64 N=1024 V=64 k=16
    """,
    "selected_scores": """
        T=1 N=65536 K=64 k=64
        T=256 N=4096 K=64 k=32 cached both
        T=1024 N=2^18 K=128 k=16
    """,
    "selected_read": """
        T=1 N=65536 KV=64 k=256
        T=128 N=4096 KV=64 k=64 cached both
        B=8 T=16 N=4096 KV=64 k=128
        T=256 N=65536 KV=128 k=64 bfloat16
    """,
    "indexer_search": """
        T=1 H=4 N=65536 K=32 k=64
        T=128 H=4 N=4096 K=32 k=64 both
        T=512 H=8 N=2048 K=64 k=128
    """,
    "gated_write": """
        T=1 N=256 KV=64 both
        T=1 N=4096 KV=64 both
        T=1 N=2^16 KV=64
        B=32 T=1 N=256 KV=64 both
        B=32 T=1 N=256 KV=64 erase compile
        B=32 T=1 N=256 KV=64 bfloat16
        B=32 T=1 N=256 KV=64 in-place
        T=1 N=4096 KV=64 in-place
        T=16 N=1024 KV=64 in-place
        T=16 N=1024 KV=64
        T=256 N=1024 KV=64 both compile
        T=256 N=1024 KV=64 bias=-4 both
        B=4 H=4 T=128 N=64 KV=64 both
        T=1024 N=256 KV=64
        T=256 N=1024 KV=64 erase=0
        T=256 N=1024 KV=64 tokens
    """,
    "softmax_write": """
        T=1 N=4096 KV=64 both
        B=32 T=1 N=256 KV=64
        B=32 T=1 N=256 KV=64 in-place
        T=256 N=1024 KV=64 both compile
        B=4 H=4 T=128 N=64 KV=64 both
    """,
    "slot_write": """
        T=1 N=128 V=64 erase
        T=1 N=4096 V=64 both
        B=32 T=1 N=128 V=32 erase both
        B=32 T=1 N=128 V=64 erase in-place
        T=256 N=1024 V=64 both
        T=64 N=128 V=64 erase both
    """,
    "sparse_write": """
        T=1 N=4096 V=64 k=8 both
        B=32 T=1 N=1024 V=64 k=8
        T=16 N=65536 V=64 k=8
        T=256 N=4096 V=64 k=8
        T=1 N=65536 V=64 k=8 in-place
        T=256 N=65536 V=64 k=8 in-place
        T=16 N=1024 V=64 k=4 step
    """,
    "memory_scan": """
        T=1 N=256 KV=64
        B=32 T=1 N=64 KV=64
        T=256 N=64 KV=64 both
        B=4 T=128 N=32 KV=32 both
    """,
    "gated_scan": """
        B=32 T=1 D=512 initial
        B=8 T=256 D=512 both compile
        B=1 T=1024 D=64 both
        B=4 T=4096 D=128
    """,
    "cell_scan": """
        B=32 T=1 D=256 initial shared
        B=1 T=128 D=128 shared both
        B=32 T=64 D=256 shared both
    """,
    "additive_read": """
        B=32 T=1 N=64 KV=128 shared=score_vector both
        B=4 T=64 N=128 KV=64 shared=score_vector both compile
    """,
    "slot_usage": """
        T=1 N=4096 K=64
        T=256 N=1024 K=64 both compile
    """,
    "merge_reads": """
        S=2 B=32 T=1 V=64
        S=2 B=4 H=8 T=128 V=64 both compile
        S=8 T=512 V=128 compile
    """,
    "cache_nll": """
        T=1 W=32000 N=256
        T=32 W=32000 N=512 compile
        T=128 W=32000 N=256 both compile
    """,
    "cache_logprobs": """
        T=1 W=32000 N=256 compile
        B=32 T=1 W=32000 N=128
        T=64 W=32000 N=256 step
    """,
    "product_key_search": """
        T=1 n=256 K=128 k=32
        T=256 n=256 K=128 k=32 both compile
    """,
    "product_key_read": """
        T=1 n=256 KV=128 k=32
        T=256 n=256 KV=128 k=32 both compile
        H=4 T=128 n=128 K=128 V=256 k=16 shared=values both
    """,
    "paged_topk_search": """
        T=1 F=64 S=256 K=64 k=32
        T=64 F=16 S=1024 K=64 k=32
    """,
    "gather_rows": """
        T=1 N=2^18 V=256 k=16
        T=256 N=32000 V=512 k=1 both
        T=512 N=2^18 V=256 k=16
        T=512 N=2^18 V=256 k=16 float8 bfloat16 compile
    """,
    "memory_gate": """
        T=1 B=4 D=1024 compile
        B=4 T=256 D=1024 both compile
        B=4 T=256 D=1024 bfloat16 both
    """,
    "ngram_slots": """
        T=1 M=16
        T=1024 M=16
    """,
}


def rows() -> list[Row]:
    """Every case, in the order of the grid."""
    return [
        row for op, lines in GRID.items() for line in filter(str.strip, lines.splitlines()) for row in parse(op, line)
    ]
