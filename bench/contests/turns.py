"""Calls timed in turns. Each round gives one ratio; a second in which the machine is slow slows both sides of it."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..timers import LEAST_ROUNDS, MOST_ROUNDS, RESOLUTION, SHORTEST_SAMPLE

Call = Callable[[], object]
PAUSE = 2e-3  # seconds in which the threads of the call before stop spinning


@dataclass
class Times:
    """Seconds per call of one variant, a number per round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def take_turns(calls: Mapping[str, Call], seconds: float, before: Call | None = None) -> dict[str, Times]:
    """Times of every call, in rounds of a new order.

    before: runs untimed before each sample, which is one call then: it drops caches, say. Without it a sample follows
        an untimed call and is as many calls as its clock can tell.
    """
    count = dict.fromkeys(calls, 1)
    if before is None:
        for name, call in calls.items():
            once = min(_timed(call, 1)[0] for _ in range(2))
            count[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(once, RESOLUTION)))
    found = {name: Times() for name in calls}
    order, shuffled = list(calls), random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            shuffled.shuffle(order)
            for name in order:
                time.sleep(PAUSE)
                (before or calls[name])()
                wall, processor = _timed(calls[name], count[name])
                found[name].wall.append(wall)
                found[name].processor.append(processor)
        return found
    finally:
        if collecting:
            gc.enable()


def _timed(call: Call, count: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count
