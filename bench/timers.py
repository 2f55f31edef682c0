"""Times calls on a device, several variants interleaved, so that all of them meet the same disturbances."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the samples, in seconds per call (bytes where memory is measured)."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def _cpu_seconds(calls: Calls, first: int, count: int) -> float:
    begin = time.perf_counter()
    for i in range(first, first + count):
        calls[i % len(calls)]()
    return time.perf_counter() - begin


def _cuda_seconds(calls: Calls, first: int, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(first, first + count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


SECONDS = {"cpu": _cpu_seconds, "cuda": _cuda_seconds}
SHORTEST_SAMPLE = 5e-3  # seconds: a thousand times the resolution and the cost of the timer
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
LEAST_SAMPLES = 3


def interleave(variants: dict[str, Calls], device: str, seconds: float) -> dict[str, Spread]:
    """Median and quartiles of each variant's time per call.

    variants: name -> the same call on each input set; consecutive calls take the next set, so that no set stays in a
        cache that it would not be in.
    seconds: about how long to go on; at least five rounds. A variant that has used up half of it by itself sits out the
        rounds after its third, so that one slow peer does not set the length of the run.

    A round takes every variant once, in a new order. Before a sample there is a pause in which the threads of the
    variant before stop spinning, and one untimed call: it wakes this variant's own threads, and leaves memory behind
    that is quickly had again. A virtual machine gives memory that was free for some seconds back to its host: a result
    of 1 GiB then takes ten times as long to touch.
    """
    clock = SECONDS[device]
    order = list(variants)
    shuffled = random.Random(0)
    once = {name: clock(variants[name], 0, 1) for name in order}
    once = {name: min(clock(variants[name], 1, 1), t) for name, t in once.items()}
    count = {name: max(1, math.ceil(SHORTEST_SAMPLE / once[name])) for name in order}
    position = dict.fromkeys(order, 2)
    spent = dict.fromkeys(order, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            shuffled.shuffle(order)
            for name in order:
                if spent[name] > seconds / 2 and len(samples[name]) >= LEAST_SAMPLES and len(order) > 1:
                    continue
                time.sleep(2e-3)
                clock(variants[name], position[name], 1)
                position[name] += 1
                taken = clock(variants[name], position[name], count[name])
                spent[name] += taken
                samples[name].append(taken / count[name])
                position[name] += count[name]
    finally:
        if collecting:
            gc.enable()
    return {name: Spread.of(samples[name]) for name in variants}
