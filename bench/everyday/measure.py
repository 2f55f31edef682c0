"""One row: every variant is checked against float64, then the right ones are timed in turns."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import memkernels as mk
from memkernels.spec import several

from ..case import OWN, Case
from ..cases import gather_rows
from ..check import Exact
from ..contests.turns import Call, take_turns
from ..harness import wrong
from ..timers import Spread
from ..variants import function_of
from . import inputs
from .plain import peers_of
from .row import Row

SECONDS = 1.2  # of timing a row, about
BEHIND = 3.0  # a peer that takes so many times as long as another at first sight is not timed further
# Of results that do not depend on one another, so many are checked: axis, count.
SAMPLES = {
    **dict.fromkeys(("softmax_read", "address", "topk_search", "topk_read", "product_key_read"), ("T", 64)),
    **dict.fromkeys(("product_key_search", "paged_topk_search", "additive_read", "cache_logprobs"), ("T", 64)),
    **dict.fromkeys(("cache_nll", "sparse_read"), ("T", 64)),
    **dict.fromkeys(("gated_write", "slot_write", "slot_usage"), ("N", 512)),
}


def measure(row: Row, quick: bool = False, extra: Mapping[str, Callable] | None = None) -> dict:
    """The result of a row, without what is known of the machine.

    quick: tiny sizes, one round of almost nothing; torch.compile is left out.
    extra: more variants by name, functions like those of a form; one named ``memkernels`` stands for the library.

    Returns:
        ``ours`` and each peer's ``median`` in seconds, None where ``why`` says what is wrong; ``ratio`` (the fastest
        peer's time over ours, median of rounds) with quartiles ``low`` and ``high``, None where one side has no time.
    """
    row = row.quick() if quick else row
    sets, options = inputs.input_sets(row, cache=1 << 20 if quick else None), inputs.options(row)
    forms = peers_of(row, {**sets[0], **options}, compiled="compile" in row.words and not quick)
    own = getattr(mk, f"{row.op}_") if row.in_place else function_of(row.op)
    variants = {OWN: own, **forms, **(extra or {})}
    truth = Truth(row, sets[0], options)
    entries, calls = {}, {}
    for name, function in variants.items():
        entries[name] = truth.judge(name, function, sets[0])
        if not entries[name]["why"]:
            calls[name] = rotating([truth.call(function, tensors) for tensors in sets])
    ours = entries.pop(OWN)
    about = {"key": row.key, "op": row.op, "case": row.title, "direction": row.direction, "dtype": row.dtype}
    found = {
        **about,
        "sizes": row.sizes,
        "tolerance": truth.limit,
        "ours": None,
        "error": ours["error"],
        "why": ours["why"],
        "peers": entries,
        **dict.fromkeys(("best_peer", "ratio", "low", "high")),
        "samples": 0,
    }
    del truth
    if OWN in calls:
        with torch.set_grad_enabled(row.step):
            _timed(found, calls, 0.01 if quick else SECONDS)
    return found


def _timed(found: dict, calls: dict[str, Call], seconds: float) -> None:
    """Times and the ratio, into ``found``."""
    with_chances(calls, found["peers"])
    times = take_turns(calls, seconds)
    medians = {name: Spread.of(one.wall).median for name, one in times.items()}
    found["ours"] = medians.pop(OWN)
    for name, median in medians.items():
        found["peers"][name]["median"] = median
    if not medians:
        return
    best = found["best_peer"] = min(medians, key=medians.__getitem__)
    spread = Spread.of([theirs / own for theirs, own in zip(times[best].wall, times[OWN].wall)])
    found |= {"ratio": spread.median, "low": spread.low, "high": spread.high, "samples": spread.samples}


def with_chances(calls: dict[str, Call], entries: Mapping[str, dict]) -> None:
    """Drop the peers that cannot be the fastest."""
    once = {name: min(_seconds(call) for _ in range(3)) for name, call in calls.items() if name != OWN}
    least = min(once.values(), default=0.0)
    for name, taken in once.items():
        if taken > BEHIND * least + 20e-6:
            fastest = min(once, key=once.__getitem__)
            entries[name]["why"] = f"took {taken / least:.0f} times as long as {fastest} at first sight"
            del calls[name]


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rotating(calls: Sequence[Call]) -> Call:
    """The next of the calls, each time."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


class Truth:
    """What a row must give, in float64, on one input set.

    A step is checked in its output and in every gradient. Its scalar is ``<output, d>`` with a fixed random ``d``, so
    that ``d`` is the gradient that a layer above hands down; the product itself is not computed.
    """

    def __init__(self, row: Row, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
        self.row, self.options = row, options
        self.grads = inputs.wanted(row, tensors) if row.step else ()
        check = CHECKS.get(row.op)
        if row.op == "gather_rows" and "float8" not in row.words:
            check = None
        forward = Case(
            op=row.op,
            sizes=row.sizes,
            quick=row.sizes,
            make=inputs.make,
            flops=lambda sizes: 0,
            bytes=lambda sizes, item: 0,
            dtype=row.dtype,
            options=options,
            sample=SAMPLES.get(row.op),
            check=check if not row.step else None,
        )
        backward = Case(**{**vars(forward), "direction": "backward", "grads": self.grads, "sample": None})
        self.d_out = _d_output(several(function_of(row.op)(**tensors, **options))[0]) if row.step else None
        self.exact = [Exact(forward, tensors, None)]
        if row.step:
            self.exact.append(Exact(backward, tensors, self.d_out))
        self.limits = [exact.limit() for exact in self.exact]
        self.limit = max(self.limits)

    def call(self, function: Callable, tensors: Mapping[str, Tensor]) -> Call:
        """The call to time. One that writes into its memory gets one of its own."""
        if self.row.in_place:
            tensors = {**tensors, "values": tensors["values"].clone()}
        if not self.row.step:
            return functools.partial(function, **tensors, **self.options)
        leaves = {name: t.detach().requires_grad_() if name in self.grads else t for name, t in tensors.items()}
        run, wanted, d_out = (
            functools.partial(function, **leaves, **self.options),
            [*map(leaves.get, self.grads)],
            self.d_out,
        )

        def step():
            output = several(run())[0]
            return output, torch.autograd.grad(output, wanted, d_out)

        return step

    def results(self, call: Call) -> list[list[Tensor]]:
        """The main result, and for a step the gradients."""
        with torch.set_grad_enabled(self.row.step):
            found = call()
        if not self.row.step:
            return [[several(found)[0]]]
        output, gradients = found
        return [[output.detach()], list(gradients)]

    def judge(self, name: str, function: Callable, tensors: Mapping[str, Tensor]) -> dict:
        """Error of a variant, and why it gets no speed."""
        entry: dict[str, Any] = {"median": None, "error": None, "why": ""}
        try:
            got = self.results(self.call(function, tensors))
            errors = [exact.error(part) for exact, part in zip(self.exact, got)]
            whys = filter(None, (wrong(error, limit, name) for error, limit in zip(errors, self.limits)))
            entry |= {"error": max(errors) if max(errors) < float("inf") else None, "why": next(whys, "")}
            if not entry["why"] and name == OWN and not _equal(got, self.results(self.call(function, tensors))):
                entry["why"] = "a second run gave other bits"
        except Exception as error:  # that is its result
            entry["why"] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]:.200}"
        return entry


def _d_output(output: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=random).to(output.dtype)


def _equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


def sparse_written(tensors: Mapping[str, Tensor], d_out: Tensor | None, outputs: Sequence[Tensor]) -> float:
    """Error of sparse_write, whose reference makes a memory for each of T * k writes: here one is written into."""
    values, indices, weights, write = (tensors[name] for name in ("values", "indices", "weights", "write"))
    memory = values.double().reshape(-1, *values.shape[-2:]).clone()  # [streams, N, V], one stream where it is shared
    parts = [x.reshape(len(memory), -1, x.shape[-1]) for x in (indices, weights.double(), write.double())]
    for stream, at, a, w in zip(memory, *parts):
        for t in range(len(w)):
            for j in range(at.shape[-1]):
                stream[at[t, j]] += a[t, j] * (w[t] - stream[at[t, j]])
    wanted = memory.view(values.shape)
    return float((outputs[0].double() - wanted).abs().max() / wanted.abs().max())


CHECKS = {"sparse_write": sparse_written, "gather_rows": gather_rows.check}
