"""``python -m bench attention``: ``attn_implementation="memkernels"`` beside ``sdpa`` and ``eager`` of transformers.

All are timed in turns, each call by the time of the processor, so that other programs hardly move the ratios. Each
result is held against that of ``sdpa`` before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import unittest.mock as mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import results
from .calls import CASES, NAMES, Case, noted

OUT = results.DIRECTORY / "attention-cpu.json"
LAYERS = 30  # of SmolLM2-135M: a pass makes the mask once


def measured(case: Case, dtype: torch.dtype, rounds: int, seconds: float) -> dict[str, Any]:
    """One row: processor milliseconds of a call and of its mask, by implementation."""
    from memkernels.integrations.transformers import attention

    calls = {name: noted(case, name, dtype) for name in NAMES}
    wanted = calls["sdpa"].attend().detach().float()
    real = _real(case, wanted)
    for name in NAMES:
        got = calls[name].attend().detach().float()
        torch.testing.assert_close(got[real], wanted[real], atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-3)

    variants: dict[str, Callable[[], Any]] = {name: call.attend for name, call in calls.items()}
    variants.update({f"mask of {name}": call.mask for name, call in calls.items()})
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with torch.set_grad_enabled(case.backward):
        for _ in range(rounds):
            for name, call in variants.items():
                taken[name].append(_processor(call, seconds))
    with mock.patch.object(attention, "_sdpa", wraps=attention._sdpa) as asked:
        calls["memkernels"].attend()
    row: dict[str, Any] = {"case": case.title, **case._asdict(), "dtype": str(dtype)[6:]}
    row["goes to"] = "sdpa" if asked.called else "softmax_read"
    row["milliseconds"] = {name: 1e3 * statistics.median(found) for name, found in taken.items()}
    for peer in ("sdpa", "eager"):
        pairs = {name: zip(taken[name], taken[f"mask of {name}"]) for name in ("memkernels", peer)}
        whole = {name: [LAYERS * attend + mask for attend, mask in found] for name, found in pairs.items()}
        row[f"{peer} over memkernels"] = _median_ratio(taken[peer], taken["memkernels"])
        row[f"{peer} over memkernels, {LAYERS} layers and mask"] = _median_ratio(whole[peer], whole["memkernels"])
    return row


def _median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Of rounds, each beside its own."""
    return statistics.median(a / b for a, b in zip(theirs, ours))


def _real(case: Case, out: torch.Tensor) -> torch.Tensor:
    """Which tokens of ``out [B, T, H, K]`` are no padding."""
    at = torch.arange(out.shape[1])
    if not case.lengths:
        return torch.ones(out.shape[:2], dtype=torch.bool)
    return torch.stack([at >= case.tokens - min(own, case.tokens) for own in case.lengths])


def _processor(call: Callable[[], Any], seconds: float) -> float:
    """Processor seconds of a call: as many as take ``seconds``."""
    count, begin = 0, time.process_time()
    while count == 0 or time.process_time() - begin < seconds:
        call()
        count += 1
    return (time.process_time() - begin) / count


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention", description=__doc__)
    parser.add_argument("--out", type=Path, help="the result file (a full run: bench/results)")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works")
    parser.add_argument("--only", default="", help="cases whose title has this word")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for case in (case for case in CASES if options.only in case.title):
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(measured(case, dtype, 2 if options.quick else 5, 0.01 if options.quick else 0.1))
            row = rows[-1]
            times = ", ".join(f"{name} {ms:.3f}" for name, ms in row["milliseconds"].items())
            print(f"{row['dtype']} {case.title}: {row['sdpa over memkernels']:.2f}x sdpa; ms: {times}", flush=True)
    out = options.out or (None if options.quick or options.only else OUT)
    if out is not None:
        import transformers

        setting = {**results.environment("cpu", 1), "transformers": transformers.__version__}
        out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    return 0
