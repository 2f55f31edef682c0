"""Time of each op for the demonstration: fused, reference and what PyTorch offers, interleaved in one run.

A first impression of this machine. The benchmark is ``python -m bench``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops

SECONDS_PER_CASE = 1.2
MOST_ROUNDS = 50
EAGER = "PyTorch"


@dataclass(frozen=True)
class Case:
    """One row: ``fused(backend=...)``, and the same in PyTorch's own operators where that is not the reference."""

    name: str
    sizes: str
    call: Callable[..., object]
    eager: Callable[[], object] | None
    eager_name: str = ""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one case by variant: ``"fused"``, ``"reference"``, ``"PyTorch"``."""

    case: Case
    ms: dict[str, float]


def eager_gated_write(values: Tensor, keys: Tensor, query: Tensor, write: Tensor) -> Tensor:
    """The gated write without a loop: the suffix product of 1 - a is the share of token t that later tokens leave."""
    s = query @ keys.mT * query.shape[-1] ** -0.5
    kept = F.logsigmoid(-s)
    from_here = kept.flip(-2).cumsum(-2).flip(-2)
    weights = torch.exp(F.logsigmoid(s) + from_here - kept)
    return values * torch.exp(from_here[..., 0, :]).unsqueeze(-1) + weights.mT @ write


def eager_topk_read(query: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    """Top-k read through the whole score matrix."""
    best, index = (query @ keys.mT * query.shape[-1] ** -0.5).topk(k, dim=-1)
    return torch.einsum("tk,tkv->tv", best.softmax(-1), values[index])


def cases(tokens: int = 1024, slots: int = 2048, many: int = 65536) -> list[Case]:
    """Every op once, the main one also backward; inputs are random. ``many``: slots of the searches and gathers."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    t, n, w, few, k = tokens, slots, 64, 32, 32
    query, keys, values, write = normal(t, w), normal(n, w), normal(n, w), normal(t, w)
    some, big_keys, big_values = normal(few, w), normal(many, w), normal(many, w)
    index, weights = torch.randint(many, (t, k), generator=random), normal(t, k)
    reads, lses = normal(8, t, w), normal(8, t)
    lse = torch.logsumexp(query @ keys.mT * w**-0.5, -1)
    trained = [x.clone().requires_grad_() for x in (query, keys, values)]

    def backward(read: Callable[..., Tensor], **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(read(*trained, **options), trained, write)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]

    def scores() -> Tensor:
        return query @ keys.mT * w**-0.5

    part = values[: n // 2], keys[: n // 2], query[: t // 4], write[: t // 4]  # the reference loops over the tokens
    sizes, search, gather = f"T={t} N={n}", f"T={few} N={many} k={k}", f"T={t} N={many} k={k}"
    return [
        Case("softmax_read", sizes, lambda **b: ops.softmax_read(query, keys, values, **b),
             lambda: sdpa(query, keys, values), "scaled_dot_product_attention"),
        Case("softmax_read, training", sizes, lambda **b: backward(ops.softmax_read, **b),
             lambda: backward(sdpa), "scaled_dot_product_attention"),
        Case("gated_write", f"T={t // 4} N={n // 2}", lambda **b: ops.gated_write(*part, **b),
             lambda: eager_gated_write(*part), "cumsum of log(1 - gate)"),
        Case("topk_search", search, lambda **b: ops.topk_search(some, big_keys, k, **b),
             lambda: (some @ big_keys.mT).topk(k), "matmul, topk"),
        Case("topk_read", search, lambda **b: ops.topk_read(some, big_keys, big_values, k, **b),
             lambda: eager_topk_read(some, big_keys, big_values, k), "matmul, topk, gather"),
        Case("sparse_read", gather, lambda **b: ops.sparse_read(big_values, index, weights, **b),
             lambda: F.embedding_bag(index, big_values, per_sample_weights=weights, mode="sum"), "embedding_bag"),
        Case("address", sizes, lambda **b: ops.address(query, keys, **b),
             lambda: scores().softmax(-1), "matmul, softmax"),
        Case("slot_usage", sizes, lambda **b: ops.slot_usage(query, keys, lse, **b),
             lambda: scores().softmax(-1).sum(0), "matmul, softmax, sum"),
        Case("merge_reads", f"S=8 T={t}", lambda **b: ops.merge_reads(reads, lses, **b), None),
    ]  # fmt: skip


def measure(fused: str, seconds: float = SECONDS_PER_CASE) -> list[Timing]:
    """Median time of every variant of every case; variants take turns, so that other load slows all of them."""
    from tqdm import tqdm

    timings = []
    for case in tqdm(cases(), desc="timing", unit="op"):
        variants = {
            "fused": lambda c=case: c.call(backend=fused),
            "reference": lambda c=case: c.call(backend="reference"),
        }
        if case.eager is not None:
            variants[EAGER] = case.eager
        for variant in variants.values():
            variant()
        taken: dict[str, list[float]] = {name: [] for name in variants}
        end = time.perf_counter() + seconds
        for number in range(MOST_ROUNDS):
            if number and time.perf_counter() > end:
                break
            for name, variant in variants.items():
                start = time.perf_counter()
                variant()
                taken[name].append(1e3 * (time.perf_counter() - start))
        timings.append(Timing(case, {name: statistics.median(ms) for name, ms in taken.items()}))
    return timings


def table(timings: list[Timing]) -> str:
    """Milliseconds, and the speed-up of the fused op."""
    lines = [f"{'op':24}{'sizes (float32, K = V = 64)':28}{'fused ms':>10}{'reference':>18}{'PyTorch':>18}"]
    for timing in timings:
        fused = timing.ms["fused"]
        cells = [
            f"{ms:.2f} ({ms / fused:.1f}x)" if (ms := timing.ms.get(name)) else "-" for name in ("reference", EAGER)
        ]
        row = f"{timing.case.name:24}{timing.case.sizes:28}{fused:10.2f}{cells[0]:>18}{cells[1]:>18}"
        lines.append(f"{row}  {timing.case.eager_name}".rstrip())
    return "\n".join(lines)
