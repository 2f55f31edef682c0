"""Launch plans: a launcher runs once per shape, on tensors without memory; what it would do is kept and replayed.

A launcher is ordinary Python: it checks shapes, cuts loops into parts, makes views and results. That takes ten to
twenty times as long as a small kernel runs, and depends on nothing but what :func:`_key` says: shapes, strides, dtypes
and alignment of the tensors, the other arguments, and whether float32 may be multiplied as TF32. So the first call of a
kind runs the launcher on ``meta`` tensors, under a mode that notes every operation that would compute, allocate or
launch. A :class:`Replay` does just those, on the tensors of a call: views are gone, only their offsets are left. A
launcher that looked at a number would fail at once: ``meta`` tensors have none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import builds

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from .interpreter import repair

    repair()
LIMIT = 2048  # replays that are kept; beyond, the one recorded first is forgotten
_current = threading.local()  # .recording: where launches of this thread are noted


@dataclass(frozen=True)
class Ref:
    """A view of place ``index``: its first element lies ``offset`` bytes behind that of the place."""

    index: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    whole: bool

    def tensor(self, places: list[Tensor]) -> Tensor:
        base = places[self.index]
        if self.whole:
            return base
        if base.dtype != self.dtype:
            base = base.view(self.dtype)
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset // self.dtype.itemsize)


class Launched(NamedTuple):
    """One launch as it was noted. row: the key of its configuration in the table. build: what it compiles."""

    kernel: str
    programs: int
    constants: dict
    row: tuple[str, str, int, int]
    build: builds.Build


class Recording(TorchDispatchMode):
    """Notes what a launcher does: steps on places, of which the tensor arguments are the first.

    arch: the architecture whose configurations the launcher sees. capability: what kernels are compiled for, 9.0 as 90.
    device: where the steps will run. aligned: whether each of the first places begins at a multiple of 16 bytes.
    """

    def __init__(self, arch: str, capability: int, device: torch.device, aligned: tuple[bool, ...] = ()) -> None:
        super().__init__()
        self.arch, self.capability, self.device = arch, capability, device
        self.steps: list[Callable[[list], None]] = []
        self.touched: list[set[int]] = []  # places, by step
        self.launches: list[Launched] = []
        self._bases: list[Tensor] = []  # of each place
        self._place: dict[int, int] = {}  # storage -> place
        self._alive: list[Tensor] = []  # keeps storages, which are known by address
        self._aligned = aligned

    def place(self, base: Tensor) -> int:
        """A new place for ``base``."""
        self._bases.append(base)
        self._place[_storage(base)] = len(self._bases) - 1
        return len(self._bases) - 1

    def ref(self, x: Tensor) -> Ref:
        if _storage(x) not in self._place:  # made before the recording
            self.place(x)
        index = self._place[_storage(x)]
        base, offset = self._bases[index], x.storage_offset() * x.itemsize
        whole = (x.shape, x.stride(), x.dtype, offset) == (base.shape, base.stride(), base.dtype, 0)
        return Ref(index, offset, tuple(x.shape), tuple(x.stride()), x.dtype, whole)

    def is_aligned(self, x: Tensor) -> bool:
        """Whether ``x`` will begin at a multiple of 16 bytes, as new memory does."""
        index = self.ref(x).index
        return (index >= len(self._aligned) or self._aligned[index]) and x.storage_offset() * x.itemsize % 16 == 0

    def note(self, step: Callable[[list], None], touched: set[int]) -> None:
        self.steps.append(step)
        self.touched.append(touched)

    def __enter__(self):
        self._before = getattr(_current, "recording", None)
        _current.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        _current.recording = self._before
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outs = list(result) if isinstance(result, (tuple, list)) else [result]
        outs = [x for x in outs if isinstance(x, Tensor)]
        self._alive += outs
        fresh = any(_storage(x) not in self._place for x in outs)
        if fresh or result is None or func._schema.is_mutable:  # the others are views
            self._note(func, args, kwargs, outs)
        return result

    def _note(self, func, args: tuple, kwargs: dict, outs: list[Tensor]) -> None:
        kwargs = {name: self.device if name == "device" else x for name, x in kwargs.items()}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [self.ref(x) if isinstance(x, Tensor) else x for x in leaves]
        new = [(i, self.place(x)) for i, x in enumerate(outs) if _storage(x) not in self._place]
        if func is torch.ops.aten.empty.memory_format and kwargs.get("memory_format") is None:
            options = {name: kwargs[name] for name in ("dtype", "device") if name in kwargs}
            return self.note(_Empty(list(args[0]), options, new[0][1]), {new[0][1]})
        touched = {x.index for x in leaves if isinstance(x, Ref)} | {place for _, place in new}
        self.note(_Operation(func, leaves, spec, new, len(outs)), touched)

    def launch(self, kernel, programs: int, arguments: tuple, constants: dict, options: dict, row: tuple) -> None:
        """Note a launch of ``programs`` programs."""
        if INTERPRETED:
            leaves, spec = pytree.tree_flatten(arguments)
            leaves = [self.ref(x) if isinstance(x, Tensor) else x for x in leaves]
            touched = {x.index for x in leaves if isinstance(x, Ref)}
            self.note(_Interpreted(kernel, programs, leaves, spec, {**constants, **options}), touched)
            return
        given = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
        build = builds.build(kernel, given, options, self.capability, self.is_aligned)
        self.launches.append(Launched(kernel.__name__, programs, constants | options, row, build))
        taken = build.taken(given)
        refs = [(i, self.ref(x)) for i, x in enumerate(taken) if isinstance(x, Tensor)]
        taken = [None if isinstance(x, Tensor) else x for x in taken]  # a kept tensor would keep its storage
        self.note(_Launch(build, programs, taken, refs, self.device.index), {ref.index for _, ref in refs})


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Operation:
    """One operation of torch."""

    def __init__(self, func, leaves: list, spec, new: list[tuple[int, int]], count: int) -> None:
        self.func, self.leaves, self.spec, self.new, self.count = func, leaves, spec, new, count

    def __call__(self, places: list[Tensor]) -> None:
        leaves = [x.tensor(places) if isinstance(x, Ref) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        result = self.func(*args, **kwargs)
        for i, place in self.new:
            places[place] = result[i] if self.count > 1 else result


class _Empty:
    """New memory: by far the most frequent operation, so without the way that any operation takes."""

    def __init__(self, size: list[int], options: dict, place: int) -> None:
        self.size, self.options, self.place = size, options, place

    def __call__(self, places: list[Tensor]) -> None:
        places[self.place] = torch.empty(self.size, **self.options)


class _Launch:
    """One launch of a compiled kernel; its arguments are ready but for addresses."""

    def __init__(self, build, programs: int, given: list, refs: list[tuple[int, Ref]], device: int) -> None:
        self.build, self.programs, self.given, self.device = build, programs, given, device
        self.addresses = [(i, ref.index, ref.offset) for i, ref in refs]
        self.kernel = None

    def __call__(self, places: list[Tensor]) -> None:
        arguments = self.given.copy()
        for i, place, offset in self.addresses:
            arguments[i] = places[place].data_ptr() + offset
        if self.kernel is None:
            self._load()
        kernel, runtime = self.kernel, triton.knobs.runtime
        enter, leave, told = runtime.launch_enter_hook, runtime.launch_exit_hook, None
        stream = self.stream(self.device)
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            told = kernel.launch_metadata((self.programs, 1, 1), stream, *arguments)
        else:
            enter = leave = None
        self.run(self.programs, 1, 1, stream, self.function, self.packed, told, enter, leave, *arguments)

    def _load(self) -> None:
        kernel = self.kernel = self.build.load(self.device)
        self.run, self.function, self.packed = kernel.run, kernel.function, kernel.packed_metadata
        self.stream = triton.runtime.driver.active.get_current_stream


class _Interpreted:
    """One launch in Triton's interpreter, which takes tensors."""

    def __init__(self, kernel, programs: int, leaves: list, spec, constants: dict) -> None:
        self.kernel, self.programs, self.leaves, self.spec, self.constants = kernel, programs, leaves, spec, constants

    def __call__(self, places: list[Tensor]) -> None:
        leaves = [x.tensor(places) if isinstance(x, Ref) else x for x in self.leaves]
        self.kernel[(self.programs,)](*pytree.tree_unflatten(leaves, self.spec), **self.constants)


class Replay:
    """The steps of one kind of call."""

    def __init__(self, launcher: Callable, arguments: tuple, arch: str, capability: int, device: torch.device) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        recording = Recording(arch, capability, device, tuple(x.data_ptr() % 16 == 0 for x in tensors))
        stand_ins = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]
        for x in stand_ins:
            recording.place(x)
        left = iter(stand_ins)
        with recording:
            result = launcher(*[next(left) if isinstance(x, Tensor) else x for x in arguments])
        self.several = isinstance(result, (tuple, list))
        results = list(result) if self.several else [result]
        self.results = [recording.ref(x) if isinstance(x, Tensor) else x for x in results]
        self.room = [None] * (len(recording._bases) - len(tensors))
        # A place is left with the step that touches it last, as memory is when a launcher runs: its peak is the same.
        kept = {x.index for x in self.results if isinstance(x, Ref)} | set(range(len(tensors)))
        last = {place: i for i, touched in enumerate(recording.touched) for place in touched if place not in kept}
        left = [[p for p, at in last.items() if at == i] for i in range(len(recording.steps))]
        self.steps = list(zip(recording.steps, left))

    def __call__(self, tensors: list[Tensor]):
        places = tensors + self.room
        for step, left in self.steps:
            step(places)
            for place in left:
                places[place] = None
        results = [x.tensor(places) if isinstance(x, Ref) else x for x in self.results]
        return tuple(results) if self.several else results[0]


def _key(arguments: tuple) -> tuple:
    """All that a launcher may depend on."""
    key, floats = [], False
    for x in arguments:
        if isinstance(x, Tensor):
            key += (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16 == 0)
            floats = floats or x.dtype == torch.float32
        else:
            key.append(tuple(x) if isinstance(x, list) else x)
    key.append(floats and torch.backends.cuda.matmul.fp32_precision)
    return tuple(key)


class Launcher:
    """An operator's launcher, replayed with the device of its tensors current.

    architecture: of a device, which rows of configurations serve it, and its compute capability.
    """

    def __init__(self, launcher: Callable, architecture: Callable[[torch.device], tuple[str, int]]) -> None:
        self.launcher, self.architecture = launcher, architecture
        self.replays: OrderedDict[tuple, Replay] = OrderedDict()

    def __call__(self, *arguments):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        index = tensors[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(*arguments)
        key = _key(arguments)
        replay = self.replays.get(key)
        if replay is None:
            device = tensors[0].device
            for x in tensors:
                if x.device != device:
                    raise RuntimeError(f"{self.launcher.__name__}: all tensors must be on {device}, got {x.device}")
            replay = self.replays[key] = Replay(self.launcher, arguments, *self.architecture(device), device)
            if len(self.replays) > LIMIT:
                self.replays.popitem(last=False)
        return replay(tensors)


def recording() -> Recording:
    """Where the launcher that runs in this thread is noted."""
    return _current.recording
