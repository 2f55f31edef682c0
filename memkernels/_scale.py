"""What a dense read of a memory costs whose slots lie on R ranks, on paper: ``python -m memkernels scale``.

    t = max(N b / (R B_mem), 2 T N (K + V) / (R F)) + c a log2 R + 2 (R - 1) / R T (V + 1) s / B_net

N slots of b bytes, T tokens; B_mem, F and B_net: bandwidth of a device's memory, its arithmetic, its network; c
collectives of a latency a; s: bytes of a number that is exchanged, 4, or 8 beside float64. The first term is the
roofline of one shard, the other two are the merge of the reads.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1, "float8_e4m3fn": 1}
# H200 SXM: 141 GB at 4.8 TB/s, 989 TFLOP/s dense in bfloat16, 400 Gbit/s of network per GPU.
H200 = {"memory": 141e9, "bandwidth": 4.8e12, "flops": 989e12, "network": 50e9, "latency": 10e-6}


@dataclass(frozen=True)
class Cost:
    """ranks: how many. slot_bytes: of all slots. rank_bytes: of those of a rank. moved: bytes that a rank receives.
    The rest in seconds."""

    ranks: int
    slot_bytes: float
    rank_bytes: float
    moved: int
    memory: float
    arithmetic: float
    latency: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic) + self.latency + self.network


def exchanged(tokens: int, row_bytes: int, ranks: int) -> int:
    """The bytes that each rank receives where all ranks merge one row per token.

    By blocks of tokens, merged on one rank each and sent to all; or by one all-gather where that moves no more.
    """
    block = -(-tokens // ranks)
    if tokens <= 2 * block:
        return (ranks - 1) * tokens * row_bytes
    return 2 * (ranks - 1) * block * row_bytes


def read_cost(
    slots: float,
    key_dim: int,
    value_dim: int,
    *,
    dtype: str = "bfloat16",
    tokens: int = 1,
    ranks: int | None = None,
    memory: float = H200["memory"],
    bandwidth: float = H200["bandwidth"],
    flops: float = H200["flops"],
    network: float = H200["network"],
    latency: float = H200["latency"],
) -> Cost:
    """The cost of :func:`memkernels.softmax_read` over ``slots`` on ``ranks``; None: as many as hold them."""
    slot_bytes = slots * (key_dim + value_dim) * DTYPES[dtype]
    ranks = max(math.ceil(slot_bytes / memory), 1) if ranks is None else ranks
    moved = exchanged(tokens, (value_dim + 1) * (8 if dtype == "float64" else 4), ranks)
    steps = 0 if ranks == 1 else 1 if tokens <= 2 * -(-tokens // ranks) else 2
    return Cost(
        ranks=ranks,
        slot_bytes=slot_bytes,
        rank_bytes=slot_bytes / ranks,
        moved=moved,
        memory=slot_bytes / ranks / bandwidth,
        arithmetic=2 * tokens * slots * (key_dim + value_dim) / ranks / flops,
        latency=steps * latency * math.log2(ranks),
        network=moved / network,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memkernels scale", description="What a dense read of slots on several ranks costs, on paper."
    )
    parser.add_argument("--slots", type=float, required=True, help="N, such as 1e9")
    parser.add_argument("--key-dim", type=int, default=64, help="K (default: 64)")
    parser.add_argument("--value-dim", type=int, default=64, help="V (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the slots (default: bfloat16)")
    parser.add_argument("--tokens", type=int, default=1, help="T, tokens of a call (default: 1)")
    parser.add_argument("--ranks", type=int, help="R (default: as many as hold the slots)")
    parser.add_argument("--memory", type=float, default=H200["memory"], help="bytes of a device (default: an H200)")
    parser.add_argument("--bandwidth", type=float, default=H200["bandwidth"], help="bytes/s of its memory")
    parser.add_argument("--flops", type=float, default=H200["flops"], help="operations/s of its arithmetic")
    parser.add_argument("--network", type=float, default=H200["network"], help="bytes/s that it receives")
    parser.add_argument("--latency", type=float, default=H200["latency"], help="seconds of a collective, per log2 R")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    options = vars(parser.parse_args(list(argv)))
    as_json = options.pop("json")
    for name, value in options.items():
        if value is not None and not isinstance(value, str) and not (0 < value < math.inf):
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    cost = read_cost(options.pop("slots"), options.pop("key_dim"), options.pop("value_dim"), **options)
    print(json.dumps({**asdict(cost), "seconds": cost.seconds}, indent=2) if as_json else render(cost))
    return 0


def render(cost: Cost) -> str:
    """The cost as a table."""
    bound = "memory" if cost.memory >= cost.arithmetic else "arithmetic"
    rows = [
        ("slots", f"{cost.slot_bytes / 1e9:,.4g} GB, on {cost.ranks:,} ranks of {cost.rank_bytes / 1e9:,.4g} GB"),
        ("bandwidth of memory", f"{cost.memory * 1e3:.4g} ms"),
        ("arithmetic", f"{cost.arithmetic * 1e3:.4g} ms"),
        ("latency of collectives", f"{cost.latency * 1e3:.4g} ms"),
        ("network", f"{cost.network * 1e3:.4g} ms for {cost.moved / 1e6:.4g} MB received by each rank"),
        ("a read", f"{cost.seconds * 1e3:.4g} ms, bound by {bound}"),
    ]
    return "\n".join(f"{name:<24}{text}" for name, text in rows)
