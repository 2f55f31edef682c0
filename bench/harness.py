"""Runs a case: checks every variant, then times the right ones interleaved, and makes one result row of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from memkernels import _native
from memkernels.backends import use_backend

from . import memory
from .case import OWN, Case
from .check import PEER_SLACK, Exact
from .peers import peers_of
from .timers import lane, take_turns, timer
from .variants import d_output, own, own_backend, prepare, results


@dataclass(frozen=True)
class Settings:
    """How a run is made."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    @property
    def seconds(self) -> float:
        """About how long the timing of one case takes. Events on a GPU scatter less than a CPU's clock."""
        return 0.3 if self.quick else 2.0 if self.device == "cuda" else 4.0

    @property
    def cache_bytes(self) -> int:
        """The last-level cache that input sets must exceed; a quick run keeps to a few small sets."""
        if self.quick:
            return 1 << 18
        if self.device == "cuda":
            return torch.cuda.get_device_properties(0).L2_cache_size
        return max(_native.host().caches().values())


def run_case(
    case: Case, settings: Settings, extra: Mapping[str, Callable] | None = None, backend: str | None = None
) -> dict:
    """Measure one case.

    Args:
        extra: more variants by name, like the functions of a peer; one named ``memkernels`` stands for the library.
        backend: the backend of the library that is timed; by default what a call without ``backend=`` gets.

    Returns:
        the row, without what depends on the ceilings (:func:`bench.results.complete` adds it). A variant with wrong
        numbers has ``median`` None and says why.
    """
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        return _row(case, settings, extra or {})


def _row(case: Case, settings: Settings, extra: Mapping[str, Callable]) -> dict:
    sizes = case.quick if settings.quick else case.sizes
    backend, gap = own_backend(case, settings.device, sizes)
    row = {
        "op": case.op,
        "case": case.title(sizes),
        "direction": case.direction,
        "dtype": case.dtype,
        "sizes": dict(sizes),
        "unit": "s" if case.measure == "time" else "bytes",
        "flops": case.flops(sizes),
        "bytes": case.bytes(sizes, case.torch_dtype.itemsize),
        "backend": backend,
        "tolerance": None,
        **_no_speed(gap),
        "peers": {},
    }
    found, missing = peers_of(case, settings.quick)
    row["peers"] = {name: _no_speed(reason) for name, reason in missing.items()}
    variants = {OWN: own(case), **found, **extra}
    if gap and OWN not in extra:
        return row
    measure = _memory if case.measure == "memory" else _time
    row["tolerance"], entries = measure(case, settings, variants)
    row |= entries.pop(OWN)
    row["peers"] |= entries
    return row


def _no_speed(why: str, error: float | None = None) -> dict:
    finite = error if error is not None and math.isfinite(error) else None
    speed = {"median": None, "low": None, "high": None, "samples": 0, "timed": "", "host": None}
    return {**speed, "error": finite, "why": why}


def _time(case: Case, settings: Settings, variants: Mapping[str, Callable]) -> tuple[float, dict[str, dict]]:
    """The tolerance, and an entry for every variant: seconds per call, or why there are none."""
    with lane(settings.device):
        return _timed(case, settings, variants)


def _timed(case: Case, settings: Settings, variants: Mapping[str, Callable]) -> tuple[float, dict[str, dict]]:
    sets = case.inputs(case.quick if settings.quick else case.sizes, settings.device, settings.cache_bytes)
    d_out = d_output(case, sets[0])
    exact = Exact(case, sets[0], d_out)
    limit = exact.limit()
    entries, right = {}, {}
    for name, make_run in variants.items():
        try:
            calls = [prepare(case, make_run, inputs, d_out) for inputs in sets]
            got = results(case, calls[0])
        except Exception as error:  # a peer that cannot run this case says why
            if name == OWN:
                raise
            entries[name] = _no_speed(_reason(error))
            continue
        error = exact.error(got)
        why = wrong(error, limit, name)
        if not why and name == OWN:
            again = results(case, calls[0])
            why = "" if all(torch.equal(a, b) for a, b in zip(got, again)) else "a second run gave other bits"
        entries[name] = _no_speed(why, error)
        if not why:
            right[name] = calls
    del exact, got
    if OWN in right:  # without a right result of its own there is nothing to compare the peers with
        timers = {}
        with torch.set_grad_enabled(case.autograd):
            for name, calls in right.items():
                try:
                    timers[name] = timer(calls, settings.device)
                except Exception as error:
                    if name == OWN:
                        raise
                    entries[name] = _no_speed(_reason(error))
            spreads = take_turns(timers, settings.seconds)
        for name, spread in spreads.items():
            entries[name] |= asdict(spread)
    return limit, entries


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]:.200}"


def _memory(case: Case, settings: Settings, variants: Mapping[str, Callable]) -> tuple[float, dict[str, dict]]:
    """The same for bytes."""
    found = memory.measure(case, settings.device, settings.threads, settings.quick)
    limit = found.pop("tolerance")
    entries = {}
    for name, (extra, error) in found.items():
        why = wrong(error, limit, name)
        entries[name] = _no_speed(why, error)
        if not why:
            entries[name] |= {"median": extra, "low": extra, "high": extra, "samples": 1}
    return limit, entries


def wrong(error: float, limit: float, name: str) -> str:
    """Why a variant with this error gets no speed; empty when it is right."""
    limit = limit if name == OWN else PEER_SLACK * limit
    return "" if error <= limit else f"wrong: error {error:.1e} is above {limit:.1e}"
