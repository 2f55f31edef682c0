"""ngram_slots: 4,096 tokens of a text, 16 or 24 tables, folded tokens."""

from __future__ import annotations

import torch

from memkernels import odd_multipliers, prime_sizes

from ..case import Case, ratio

VOCABULARY, ROWS = 129_280, 16_000_000  # of a table: those of DeepSeek-V4.1-Flash
LENGTHS = {16: ((2, 3), 8), 24: ((2, 3, 4), 8)}  # tables -> orders, heads


def make(sizes, dtype, device, seed):
    """tokens [T], sizes [M], multipliers [J], token_map [W]."""
    orders, heads = LENGTHS[sizes["M"]]
    generator = torch.Generator(device=device).manual_seed(seed)
    return {
        "tokens": torch.randint(VOCABULARY, (sizes["T"],), device=device, generator=generator),
        "sizes": prime_sizes(ROWS, orders, heads).to(device),
        "multipliers": odd_multipliers(0, 1, max(orders)).to(device),
        "token_map": torch.randint(VOCABULARY, (VOCABULARY,), device=device, generator=generator),
    }


def bytes_moved(s, item):
    return 8 * s["T"] * (2 + s["M"])


def case(tables: int, *goals) -> Case:
    orders, heads = LENGTHS[tables]
    return Case(
        op="ngram_slots",
        sizes={"T": 4096, "M": tables},
        quick={"T": 256, "M": tables},
        make=make,
        flops=lambda s: 0,  # integers alone
        bytes=bytes_moved,
        dtype="int64",
        options={"orders": orders, "heads": heads},
        goals=goals,
    )


CASES = [case(tables, ratio(50, "loop"), ratio(5, "eager")) for tables in LENGTHS]
