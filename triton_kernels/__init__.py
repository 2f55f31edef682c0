"""Triton kernels of memkernels: every hot-path op on any GPU that Triton serves.

Installed as ``memkernels.triton_kernels``; imports nothing of memkernels. :func:`register` adds the kernels to the
operators ``memkernels_triton::<op>``, ``<op>_backward`` and ``<op>_``, whose schemas memkernels defines. Triton itself,
and the file of an op, are imported at the first call of that op.

One file per op: the kernels, then their launchers; dense writes share theirs in ``write.py`` and the files it names.
``tiles.py`` and ``score_gradients.py`` hold what kernels share, ``layout.py`` and ``launch.py`` what launchers share,
``configs.json`` the launch configurations.
"""

from __future__ import annotations

import importlib

import torch

# operator -> the file of its launcher; the launcher has the operator's name (gated_write_ writes in place)
OPERATORS = {
    "additive_read": "additive_read",
    "address": "address",
    "cache_logprobs": "cache_logprobs",
    "cache_nll": "cache_nll",
    "cell_scan": "cell_scan",
    "gated_scan": "gated_scan",
    "gated_write": "gated_write",
    "memory_scan": "memory_scan",
    "merge_reads": "merge_reads",
    "product_key_read": "product_key_read",
    "product_key_search": "product_key_search",
    "slot_usage": "slot_usage",
    "slot_write": "slot_write",
    "softmax_read": "softmax_read",
    "softmax_read_compressed": "softmax_read",
    "softmax_write": "softmax_write",
    "sparse_read": "sparse_read",
    "sparse_read_compressed": "sparse_read",
    "sparse_write": "sparse_write",
    "topk_read": "topk_read",
    "topk_read_compressed": "topk_read",
    "topk_search": "topk_search",
    "topk_search_compressed": "topk_search",
}
IN_PLACE = ("gated_write", "slot_write", "softmax_write", "sparse_write")


def names() -> list[tuple[str, str]]:
    """Every operator, and the file of its launcher."""
    pairs = [(f"{op}{suffix}", file) for op, file in OPERATORS.items() for suffix in ("", "_backward")]
    return pairs + [(f"{op}_", OPERATORS[op]) for op in IN_PLACE]


def register(device: str) -> torch.library.Library:
    """Add the kernels to the operators on ``"cuda"``, or on ``"cpu"`` for Triton's interpreter.

    The caller keeps the result alive: kernels leave with it.
    """
    library = torch.library.Library("memkernels_triton", "IMPL")
    for name, _ in names():
        library.impl(name, _at_first_call(name), device.upper())
    return library


def launcher(name: str):
    """The launcher of the operator ``name``, replayed (``replay.py``)."""
    from . import launch, replay

    file = dict(names())[name]
    return replay.Launcher(getattr(importlib.import_module(f"{__name__}.{file}"), name), launch.architecture)


def _at_first_call(name: str):
    """The launcher of ``name``, found at the first call."""
    found = []

    def run(*arguments):
        if not found:
            found.append(launcher(name))
        return found[0](*arguments)

    return run
