"""Calls of the Triton backend that between them launch every kernel, for one dtype, row width and device.

On the ``meta`` device nothing is computed: ``bench.compile`` compiles what would be launched. ``bench.tune`` runs the
same calls on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels import _triton

TOKENS, SLOTS, FEW = 1024, 4096, 4
SCALE = 0.125


def plain(operator: str) -> Callable:
    """The launcher of one operator of the backend, which notes what it would launch."""
    package = _triton.kernels()
    file = dict(package.names())[operator]
    return getattr(importlib.import_module(f"{package.__name__}.{file}"), operator)


@functools.cache
def replayed(operator: str) -> Callable:
    """The same as the dispatcher calls it."""
    return _triton.kernels().launcher(operator)


@dataclass(frozen=True)
class Launch:
    """One call. ``main``: the shape that a configuration is chosen for; others reach variants of the same kernels.

    packed: of compressed slots, whose kernels have rows of their own.
    """

    name: str
    run: Callable[[], object]
    main: bool = False
    packed: bool = False


def launches(dtype: torch.dtype, width: int, device: str, tokens: int = TOKENS, slots: int = SLOTS) -> Iterator[Launch]:
    """All calls for rows of ``width`` columns of ``dtype``; those on ``meta`` run in a ``replay.Recording``."""
    launcher = plain if device == "meta" else replayed

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_() if device != "meta" else _meta(shape, dtype)

    def _meta(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def named() -> Tensor:
        i = torch.zeros((2, tokens, 32), dtype=torch.int64, device=device)
        return i if device == "meta" else i.random_(0, slots)

    def read(t: int, n: int, mask: Tensor | None, backward: bool) -> Callable:
        q, k, v = new(2, t, width), new(2, n, width), new(2, n, width)

        def run():
            r, lse, rest = launcher("softmax_read")(q, k, v, mask, SCALE)
            if backward:
                launcher("softmax_read_backward")(q, k, v, mask, r, lse, rest, r, lse, SCALE, [True] * 4)

        return run

    def additive(t: int, n: int) -> Callable:
        q, k, v, u = new(2, t, width), new(2, n, width), new(2, n, width), new(width)

        def run():
            r, lse, rest = launcher("additive_read")(q, k, v, u, None)
            launcher("additive_read_backward")(q, k, v, u, None, r, lse, rest, r, lse, [True] * 5)

        return run

    def cache(n: int) -> Callable:
        logits, scores, mix = new(2, tokens, 50257), new(2, tokens, n), new(2, tokens, dtype=torch.float32)
        words = torch.zeros((2, tokens, n), dtype=torch.int64, device=device)
        target = words[..., 0]

        def run():
            nll, lse, rest = launcher("cache_nll")(logits, target, scores, words, mix)
            launcher("cache_nll_backward")(logits, target, scores, words, mix, lse, rest, nll, [True] * 3)
            p, lse, rest = launcher("cache_logprobs")(logits, scores, words, mix)
            launcher("cache_logprobs_backward")(logits, scores, words, mix, lse, rest, p, [True] * 3)

        return run

    def products(k: int) -> Callable:
        q, subkeys, v = new(2, tokens, 2 * width), new(2, 512, width), new(512 * 512, width)

        def run():
            scores, i = launcher("product_key_search")(q, subkeys, k, SCALE)
            launcher("product_key_search_backward")(q, subkeys, i, scores, k, SCALE, [True] * 2)
            r, i, w = launcher("product_key_read")(q, subkeys, v, k, SCALE)
            launcher("product_key_read_backward")(q, subkeys, v, i, w, r, w, k, SCALE, [True] * 3)

        return run

    def compressed(kind: torch.dtype, t: int) -> Callable:
        q, mask, scales = new(2, t, width), new(2, slots, dtype=torch.float32), new(2, slots, dtype=torch.float32)
        keys, v = (torch.zeros((2, slots, width), dtype=kind, device=device) for _ in range(2))
        w, i = new(2, tokens, 32), named()

        def run():
            r, lse, rest = launcher("softmax_read_compressed")(q, keys, v, mask, scales, scales, SCALE)
            launcher("softmax_read_compressed_backward")(
                q, keys, v, mask, scales, scales, r, lse, rest, r, lse, SCALE, [True] * 2
            )
            r, j, p = launcher("topk_read_compressed")(q, keys, v, mask, scales, scales, 32, SCALE)
            launcher("topk_read_compressed_backward")(
                q, keys, v, mask, scales, scales, j, p, r, p, 32, SCALE, [True] * 2
            )
            launcher("topk_search_compressed")(q, keys, None, scales, 32, SCALE)
            r = launcher("sparse_read_compressed")(v, i, w, scales)
            launcher("sparse_read_compressed_backward")(v, i, w, scales, r, [True])

        return run

    def form(erase: float | Tensor) -> tuple[Tensor | None, float]:
        return (erase, 1.0) if isinstance(erase, Tensor) else (None, erase)

    def write(t: int, n: int, erase: float | Tensor, retained: bool, op: str = "gated_write") -> Callable:
        q, k, v, w = new(2, t, width), new(2, n, width), new(2, n, width), new(2, t, width)
        vector, number = form(erase)

        def run():
            args = (v, k, q, w, vector, None, None)
            out, kept = launcher(op)(*args, SCALE, number)
            d_kept = kept if retained else None
            launcher(f"{op}_backward")(*args, kept, out, d_kept, SCALE, number, [True] * 6)

        return run

    def given(t: int, n: int, erase: float | Tensor) -> Callable:
        a, v, w = new(2, t, n), new(2, n, width), new(2, t, width)
        vector, number = form(erase)

        def run():
            out = launcher("slot_write")(v, a, w, vector, None, number)
            launcher("slot_write_backward")(v, a, w, vector, None, out, number, [True] * 4)

        return run

    def scatter(erase: float | Tensor) -> Callable:
        v, a, w, i = new(2, slots, width), new(2, tokens, 32), new(2, tokens, width), named()
        vector, number = form(erase)

        def run():
            out = launcher("sparse_write")(v, i, a, w, vector, number)
            launcher("sparse_write_backward")(v, i, a, w, vector, out, number, [True] * 4)

        return run

    def address(sigmoid: bool) -> Callable:
        q, k = new(2, tokens, width), new(2, slots, width)

        def run():
            w = launcher("address")(q, k, None, SCALE, sigmoid)
            launcher("address_backward")(q, k, None, w, w, SCALE, sigmoid, [True] * 3)

        return run

    def usage() -> Callable:
        q, k, lse = new(2, tokens, width), new(2, slots, width), new(2, tokens, dtype=torch.float32)

        def run():
            u = launcher("slot_usage")(q, k, lse, None, SCALE)
            launcher("slot_usage_backward")(q, k, lse, None, u, SCALE, [True] * 4)

        return run

    def merge() -> Callable:
        reads, lses = new(2, 3, tokens, width), new(2, 3, tokens, dtype=torch.float32)

        def run():
            r, lse = launcher("merge_reads")(reads, lses)
            launcher("merge_reads_backward")(reads, lses, r, lse, [True] * 2)

        return run

    def topk(t: int, n: int, k: int) -> Callable:
        q, keys, v, mask = new(2, t, width), new(2, n, width), new(2, n, width), new(2, n, dtype=torch.float32)

        def run():
            r, i, w = launcher("topk_read")(q, keys, v, mask, k, SCALE)
            launcher("topk_read_backward")(q, keys, v, mask, i, w, r, w, k, SCALE, [True] * 4)
            scores, i = launcher("topk_search")(q, keys, None, k, SCALE)
            launcher("topk_search_backward")(q, keys, None, i, scores, k, SCALE, [True] * 3)

        return run

    def sparse() -> Callable:
        v, w, i = new(2, slots, width), new(2, tokens, 32), named()

        def run():
            r = launcher("sparse_read")(v, i, w)
            launcher("sparse_read_backward")(v, i, w, r, [True] * 2)

        return run

    def gated(t: int) -> Callable:
        f, u, h = new(2, t, width), new(2, t, width), new(2, width)

        def run():
            states = launcher("gated_scan")(f, u, h)
            launcher("gated_scan_backward")(f, u, h, states, states, [True] * 3)

        return run

    def cell(streams: int, t: int) -> Callable:
        x, w, h = new(streams, t, 3 * width), new(3 * width, width), new(streams, width)

        def run():
            states = launcher("cell_scan")(x, w, h)
            launcher("cell_scan_backward")(x, w, h, states, states, [True] * 3)

        return run

    def memory(t: int, n: int, mask: Tensor | None, read_first: bool) -> Callable:
        v, k, w = new(2, n, width), new(2, n, width), new(2, t, width)
        args = (v, k, new(2, t, width), new(2, t, width), w, mask, None)

        def run():
            reads, out, lse, rest = launcher("memory_scan")(*args, SCALE, read_first)
            gradients = (reads, lse, rest, reads, out)
            launcher("memory_scan_backward")(*args, *gradients, SCALE, read_first, [True] * 6)

        return run

    mask = new(2, slots, dtype=torch.float32)
    yield Launch("softmax_read", read(tokens, slots, None, True), main=True)
    yield Launch("additive_read", additive(tokens, slots), main=True)
    yield Launch("cache_nll, cache_logprobs", cache(1024), main=True)
    yield Launch("product keys, k = 32", products(32), main=True)
    yield Launch("gated_write", write(tokens, slots, 1.0, False), main=True)
    yield Launch("topk, k = 32", topk(tokens, slots, 32), main=True)
    yield Launch("sparse_read", sparse(), main=True)
    yield Launch("slot_usage", usage(), main=True)
    yield Launch("address, softmax", address(False), main=True)
    yield Launch("merge_reads", merge(), main=True)
    yield Launch("gated_write, erase tensor", write(tokens, slots // 16, new(2, tokens, width), False), main=True)
    yield Launch("softmax_write", write(tokens, slots, 1.0, False, "softmax_write"), main=True)
    yield Launch("slot_write", given(tokens, slots, 1.0), main=True)
    yield Launch("sparse_write", scatter(1.0), main=True)
    yield Launch("gated_scan", gated(tokens), main=True)
    yield Launch("cell_scan", cell(32, 64), main=True)
    yield Launch("memory_scan", memory(tokens, slots // 16, None, False), main=True)
    yield Launch("softmax_read, mask", read(tokens, slots, mask, True))
    yield Launch("softmax_read, few tokens", read(FEW, slots, None, True))
    yield Launch("softmax_read, few slots", read(tokens, FEW, None, True))
    yield Launch("address, sigmoid", address(True))
    yield Launch("gated_write, erase 0", write(tokens, slots, 0.0, False))
    yield Launch("gated_write, erase 0.5, retained", write(tokens, slots, 0.5, True))
    yield Launch("gated_write, retained, few slots", write(tokens, FEW, 1.0, True))
    yield Launch("gated_write, erase tensor, retained", write(FEW, slots, new(2, FEW, width), True))
    yield Launch("softmax_write, erase 0, few tokens", write(FEW, slots, 0.0, False, "softmax_write"))
    yield Launch("softmax_write, erase 0.5, retained", write(tokens, slots, 0.5, True, "softmax_write"))
    vector = new(2, tokens, width)
    yield Launch("softmax_write, erase tensor, retained", write(tokens, slots // 16, vector, True, "softmax_write"))
    yield Launch("slot_write, erase 0", given(tokens, slots, 0.0))
    yield Launch("slot_write, erase 0.5, few slots", given(tokens, FEW, 0.5))
    yield Launch("slot_write, erase tensor", given(tokens, slots // 16, vector))
    yield Launch("sparse_write, erase tensor", scatter(vector))
    yield Launch("reads of int8 slots", compressed(torch.int8, tokens), packed=True)
    yield Launch("reads of float8 slots", compressed(torch.float8_e4m3fn, tokens), packed=True)
    yield Launch("product keys, k = 256", products(256))
    yield Launch("product keys, k = 300", products(300))
    yield Launch("topk, k = 8, few tokens", topk(FEW, slots, 8))
    yield Launch("topk, k = 128", topk(tokens, slots, 128))
    yield Launch("topk, k = 256", topk(tokens, slots, 256))
    yield Launch("topk, k = 1000", topk(FEW, slots, 1000))
    yield Launch("gated_scan, few tokens", gated(FEW))
    yield Launch("memory_scan, mask, read first", memory(tokens, slots, mask, True))
