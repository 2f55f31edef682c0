"""Times calls on a device, several variants interleaved, so that all of them meet the same disturbances.

On the CPU by the clock. On a GPU by events around replays of a CUDA graph of the calls, so that Python and the launches
are not part of it; beside it the time that the processor takes to issue a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the samples, in seconds per call.

    timed: how: ``"clock"``, ``"graph"``, or ``"events"`` where a GPU's calls could not be captured.
    host: on a GPU, the median seconds that the processor takes to issue a call.
    """

    median: float
    low: float
    high: float
    samples: int
    timed: str = "clock"
    host: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


class Timer:
    """Times the same call on each input set, by the clock. Consecutive calls take the next set, so that no set stays in
    a cache that it would not be in.

    A unit is what is timed at the least: ``width`` calls.
    """

    timed = "clock"
    width = 1

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.done = 0

    def issue(self, count: int) -> None:
        """``count`` calls."""
        for i in range(self.done, self.done + count):
            self.calls[i % len(self.calls)]()
        self.done += count

    def seconds(self, units: int) -> float:
        """The time of so many units."""
        begin = time.perf_counter()
        self.issue(units)
        return time.perf_counter() - begin

    def host(self) -> float | None:
        """Seconds that the processor takes to issue a call, where that is not the whole of it."""
        return None


class Cuda:
    """What a timer needs of CUDA, in torch's words. Tests put a stand-in in its place."""

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        """Work goes to one side stream. The default stream cannot be captured, and autograd runs a backward on the
        stream of its forward: a forward outside of here makes a backward that cannot be captured either."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            yield
        before.wait_stream(self.stream)

    def wait(self) -> None:
        """Until the device has done all work."""
        torch.cuda.synchronize()

    def refuse_to_wait(self, run: Callable[[], object]) -> None:
        """Run it; RuntimeError where torch would wait for the device. A capture that fails halfway leaves torch's
        allocator unable to give memory back, so what can be known before is asked before."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """A graph of what ``run`` launches; the call that replays it. What goes to another stream is not in it."""
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        return graph.replay

    def seconds(self, run: Callable[[], object]) -> float:
        """Device time between two events around what ``run`` launches."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


CUDA = Cuda()
WARM_UP = 3  # calls: kernels compile, libraries choose theirs, the allocator gets its memory
CAPTURED = 0.25  # seconds of eager calls in one graph: bounds its nodes where a call is thousands of launches
HOST_CALLS, HOST_SECONDS = 20, 5e-3  # in a row, whichever is less: the queue of the device holds about 1000 launches
HOST_SAMPLES = 5


class CudaTimer(Timer):
    """Times a graph that holds the call on every input set, one after the other, or the eager calls where there is no
    graph of them: they wait for the device, say. To be made and used inside of :func:`lane`."""

    def __init__(self, calls: Calls, cuda: Cuda) -> None:
        super().__init__(calls)
        self.cuda = cuda
        self.issue(WARM_UP)
        once = max(cuda.seconds(lambda: self.issue(1)), RESOLUTION)
        width = max(1, min(len(calls), int(CAPTURED / once)))
        try:
            cuda.refuse_to_wait(lambda: self.issue(1))
            self.replay = cuda.capture(lambda: self.issue(width))
        except Exception as error:
            print(f"timed by events: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
            self.timed, self.replay = "events", lambda: self.issue(1)
        else:
            self.timed, self.width = "graph", width

    def seconds(self, units: int) -> float:
        def run() -> None:
            for _ in range(units):
                self.replay()

        return self.cuda.seconds(run)

    def host(self) -> float:
        """Median seconds to issue a call; one of more launches than the queue holds waits for the device."""
        count = max(1, min(HOST_CALLS, int(HOST_SECONDS / self._issued(1))))
        return statistics.median(self._issued(count) for _ in range(HOST_SAMPLES))

    def _issued(self, count: int) -> float:
        """Seconds a call to issue so many eager calls into an empty queue."""
        self.cuda.wait()
        return super().seconds(count) / count


def timer(calls: Calls, device: str) -> Timer:
    """A timer for ``device``."""
    return Timer(calls) if device == "cpu" else CudaTimer(calls, CUDA)


def lane(device: str) -> contextlib.AbstractContextManager[None]:
    """Where calls on ``device`` are prepared and timed."""
    return contextlib.nullcontext() if device == "cpu" else CUDA.lane()


RESOLUTION = 1e-6  # seconds, of events
SHORTEST_SAMPLE = 5e-3  # seconds: a thousand times the resolution and the cost of the timer
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
LEAST_SAMPLES = 3


def interleave(variants: Mapping[str, Calls], device: str, seconds: float) -> dict[str, Spread]:
    """Median and quartiles of each variant's time per call: name -> the same call on each input set."""
    with lane(device):
        return take_turns({name: timer(calls, device) for name, calls in variants.items()}, seconds)


def take_turns(timers: Mapping[str, Timer], seconds: float) -> dict[str, Spread]:
    """The same for timers.

    seconds: about how long to go on; at least five rounds. A variant that has used up half of it by itself sits out the
        rounds after its third, so that one slow peer does not set the length of the run.

    A round takes every variant once, in a new order. Before a sample there is a pause in which the threads of the
    variant before stop spinning, and one untimed unit: it wakes this variant's own threads, and leaves memory behind
    that is quickly had again. A virtual machine gives memory that was free for some seconds back to its host: a result
    of 1 GiB then takes ten times as long to touch.
    """
    order = list(timers)
    shuffled = random.Random(0)
    once = {name: timers[name].seconds(1) for name in order}
    once = {name: min(timers[name].seconds(1), t) for name, t in once.items()}
    count = {name: max(1, math.ceil(SHORTEST_SAMPLE / max(once[name], RESOLUTION))) for name in order}
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
                timers[name].seconds(1)
                taken = timers[name].seconds(count[name])
                spent[name] += taken
                samples[name].append(taken / (count[name] * timers[name].width))
        return {
            name: dataclasses.replace(Spread.of(samples[name]), timed=one.timed, host=one.host())
            for name, one in timers.items()
        }
    finally:
        if collecting:
            gc.enable()
