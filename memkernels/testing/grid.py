"""Runs the contract grid: every op, backend, dtype, case and direction against the float64 reference."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends, spec
from ..registration import OPS, call
from ..spec import Op, Out
from .cases import Case, cases
from .compare import Verdict, distance, norms, small_ones, special_values, table, wrong_choice
from .inputs import SIXTEEN_BIT, Inputs, make, takes

DIRECTIONS = (*backends.DIRECTIONS, "in place")
DTYPES = (*spec.FLOATS, torch.int64)  # int64: of ops on integers


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Run on ``n`` threads. Only the kernel under test uses several: small formulas run faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Row:
    """One line of the grid: ``op`` on ``backend`` and ``device`` in ``dtype``, one ``case``.

    direction: ``"forward"``, ``"backward"`` or ``"in place"``.
    error, tolerance: of the worst result, relative; it passes where the error is at most the tolerance.
    message: what is wrong where ``passed`` is False.
    gap: nothing ran, because the backend has no such kernel; ``message`` says which.
    """

    op: str
    backend: str
    dtype: str
    device: str
    case: str
    direction: str
    error: float
    tolerance: float
    passed: bool
    message: str = ""
    gap: bool = False

    def __str__(self) -> str:
        where = f"{self.op} on {self.backend}/{self.device}, {self.dtype}, {self.case!r}, {self.direction}"
        return f"{where}: {self.message or f'error {self.error:.1e}, at most {self.tolerance:.1e}'}"


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Fill new memory with NaN (indices: the largest integer), so that a number a kernel fails to write is seen.

    That of torch's allocations, and of the results that the ``cpu`` backend allocates past torch's dispatcher.
    """
    was, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations without a deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        switch.fill_uninitialized_memory = True
        native = None if backends.BACKENDS[0].missing() else torch.ops.memkernels_cpu.fill_new_memory
        if native is not None:
            native(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warn)
            switch.fill_uninitialized_memory = fill
            if native is not None:
                native(False)


def _cotangents(op: Op, inputs: Inputs, case: Case, outputs: list[Tensor]) -> dict[int, Tensor]:
    random = torch.Generator().manual_seed(inputs.seed + 1)
    result = {}
    for i, (out, tensor) in enumerate(zip(op.outputs, outputs)):
        if out.grad:
            d = torch.randn(tensor.shape, generator=random, dtype=spec.stats_dtype(tensor.dtype))
            if case.cotangents is None or out.name in case.cotangents:
                result[i] = d.to(tensor.dtype).to(tensor.device)
    return result


class Run:
    """One evaluation of a formula or a kernel; the gradients are computed at first access."""

    def __init__(self, formula: Callable, tensors, params, wanting: list[int], cotangents: Callable):
        tensors = [t if t is None else t.detach() for t in tensors]
        self._leaves = [tensors[i].requires_grad_() for i in wanting]
        with torch.set_grad_enabled(bool(wanting)):
            results = formula(*tensors, *params)
        self._live = list(spec.several(results))
        self._cotangents = cotangents
        self.outputs = [o.detach() for o in self._live]

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        pairs = [(self._live[i], d.to(self._live[i].dtype)) for i, d in self._cotangents(self.outputs).items()]
        pairs = [(o, d) for o, d in pairs if o.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(self._leaves)
        if pairs:
            results, cotangents = zip(*pairs)
            grads = torch.autograd.grad(results, self._leaves, cotangents, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self._leaves)]


class Subject:
    """One op, case and dtype on one device: its inputs, and its reference in float64 and in plain PyTorch."""

    def __init__(self, op: Op, case: Case, dtype: torch.dtype, device: str):
        self.op, self.case, self.dtype, self.device = op, case, dtype, device
        self.inputs = make(op, case, dtype, device)
        self.wanting = self.inputs.wanting(op, case)
        self.layout = spec.check(op, self.inputs.tensors, self.inputs.params)

    def cotangents(self, outputs: list[Tensor]) -> dict[int, Tensor]:
        """The same numbers for every run: drawn in the dtype the result has in this call."""
        like = [
            torch.empty(o.shape, dtype=self.layout.shape(self.op, out, self.inputs.tensors)[1], device=o.device)
            for o, out in zip(outputs, self.op.outputs)
        ]
        return _cotangents(self.op, self.inputs, self.case, like)

    def _run(self, formula: Callable, tensors, wanting: list[int] | None = None) -> Run:
        return Run(formula, tensors, self.inputs.params, self.wanting if wanting is None else wanting, self.cotangents)

    def _run_doubled(self, formula: Callable) -> Run:
        inputs = self.inputs
        return Run(formula, inputs.doubled(), inputs.doubled_params(self.op), self.wanting, self.cotangents)

    @functools.cached_property
    def _doubled(self) -> Run:
        return self._run_doubled(self.op.reference)

    @functools.cached_property
    def plain(self) -> Run:
        """The reference formula at the dtype of the call."""
        return self._run(self.op.reference, self.inputs.tensors)

    def wanted(self, indices: Tensor | None) -> Run:
        """The reference in float64, where the op chooses slots for the choice ``indices``."""
        selected = self.op.selected
        if selected is None:
            return self._doubled
        return self._run_doubled(lambda *inputs: selected(*inputs, indices))

    def directions(self) -> list[str]:
        result = ["forward"] + (["backward"] if self.wanting else [])
        if self.op.inplace is not None:
            target = self.inputs.tensors[self.op.index(self.op.inplace)]
            own = target is not None and self.layout.memory == tuple(target.shape[:-2])
            if own and self.case.layout != "expanded" and not self.case.wants and not self.case.cotangents:
                result.append("in place")
        return result

    def rows(self, backend: str, directions: Sequence[str] | None = None) -> list[Row]:
        """This subject on one backend, in every direction unless some are named."""
        shared: dict[str, Run] = {}  # forward and backward look at one run
        threads = torch.get_num_threads()
        directions = directions or self.directions()
        # A backend without a backward kernel refuses a call that needs a gradient.
        wanting = self.wanting if "backward" in directions else []
        with _threads(1):
            return [self._row(backend, d, shared, threads, wanting) for d in directions]

    def _row(self, backend: str, direction: str, shared: dict[str, Run], threads: int, wanting: list[int]) -> Row:
        try:
            verdict = self._judge(backend, direction, shared, threads, wanting)
        except Exception as error:  # a kernel that raises is a failed row, not the end of the grid
            verdict = Verdict(math.nan, 0.0, f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]:.200}")
        name = str(self.dtype).removeprefix("torch.")
        key = (self.op.name, backend, name, self.device, self.case.name, direction)
        return Row(*key, verdict.error, verdict.tolerance, not verdict.problem, verdict.problem)

    def _judge(self, backend: str, direction: str, shared: dict[str, Run], threads: int, wanting: list[int]) -> Verdict:
        op = self.op
        inputs, target = self.inputs, None
        if direction == "in place":
            inputs, target = make(op, self.case, self.dtype, self.device), op.index(op.inplace)
        before = [None if t is None else _bits(t).clone() for t in inputs.tensors]
        with contextlib.ExitStack() as around:
            if backend != "reference":
                around.enter_context(nan_in_new_memory())
                around.enter_context(_threads(threads))
            if target is not None:
                got = self._run(functools.partial(_call, op, backend, target), inputs.tensors, [])
            else:
                if "run" not in shared:
                    kernel = functools.partial(_call, op, backend, None)
                    shared["run"] = self._run(kernel, inputs.tensors, wanting)
                got = shared["run"]
                if direction == "backward":
                    got.gradients  # noqa: B018 (computed here, where new memory is NaN)
        for i, (arg, bits, after) in enumerate(zip(op.args, before, inputs.tensors)):
            if bits is not None and after is not None and i != target and not torch.equal(bits, _bits(after)):
                return Verdict(math.nan, 0.0, f"{arg.name} was modified")
        for out, tensor in zip(op.outputs, got.outputs):
            shape, dtype = self.layout.shape(op, out, inputs.tensors)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                wanted, found = f"{list(shape)} {dtype}", f"{list(tensor.shape)} {tensor.dtype}"
                return Verdict(math.nan, 0.0, f"{out.name} must be {wanted}, got {found}")
        for i, (out, tensor) in enumerate(zip(op.outputs, got.outputs)):
            if out.dtype == "index" and (problem := self._wrong_index(i, tensor)):
                return Verdict(math.nan, 0.0, problem)
        if "wanted" not in shared:
            chosen = None if op.choice is None else got.outputs[op.outputs.index(op.choice)]
            shared["wanted"] = self.wanted(chosen)
        return self._compare(got, shared["wanted"], direction, backend)

    def _wrong_index(self, i: int, indices: Tensor) -> str:
        """What is wrong with result ``i``, which is an index; empty when nothing is."""
        if self.op.outputs[i].judge is not None:
            return wrong_choice(self.op, self.inputs.doubled(), self.inputs.params, indices, self.case.exact)
        same = torch.equal(indices, self._doubled.outputs[i])
        return "" if same else f"{self.op.outputs[i].name} differs from that of the reference"

    def _compare(self, got: Run, wanted: Run, direction: str, backend: str) -> Verdict:
        backward = direction == "backward"
        names = [self.op.args[i].name for i in self.wanting] if backward else [o.name for o in self.op.outputs]
        floats = [i for i in range(len(names)) if backward or _has_a_right_value(self.op.outputs[i])]
        ours = got.gradients if backward else got.outputs
        exact = wanted.gradients if backward else wanted.outputs
        ours, exact = ([x[i] for i in floats] for x in (ours, exact))
        names = [names[i] for i in floats]

        def plain(i: int) -> Tensor:
            return self.plain.gradients[i] if backward else self.plain.outputs[floats[i]]

        worst = Verdict(0.0, table(self.dtype, self.dtype))
        for i, (name, g, w, norm) in enumerate(zip(names, ours, exact, norms(exact))):
            label = f"gradient of {name}" if backward else name
            if problem := special_values(g, w, nan_must_stay=not backward):
                return Verdict(math.nan, 0.0, f"{label}: {problem}")
            error = distance(g, w, norm)
            tolerance = table(self.dtype, self.dtype if backward else g.dtype)
            if error > tolerance and backend != "reference":
                tolerance = max(tolerance, 2 * distance(plain(i), w, norm))
            problem = "" if error <= tolerance else f"{label}: error {error:.1e}, at most {tolerance:.1e}"
            # 16-bit gradients are computed from rounded results: small rows are mostly rounding error.
            if not problem and backend != "reference" and not (backward and self.dtype in SIXTEEN_BIT):
                positive = not backward and self.op.outputs[floats[i]].positive
                if small := small_ones(g, w, positive, self.dtype, norm, functools.partial(plain, i)):
                    problem = f"{label}: {small}"
            if bool(problem) > bool(worst.problem) or error * worst.tolerance > worst.error * tolerance:
                worst = Verdict(error, tolerance, problem or worst.problem)
        return worst


def _has_a_right_value(out: Out) -> bool:
    return out.judged and out.dtype != "index"


def _call(op: Op, backend: str, target: int | None, *inputs):
    n = len(op.args)
    tensors, params = list(inputs[:n]), tuple(inputs[n:])
    results = call(op, tensors, params, backend, inplace=target is not None)
    if target is None:
        return results
    rest = iter(spec.several(results))
    return [tensors[target] if o.name == op.inplace else next(rest) for o in op.outputs]


def _bits(x: Tensor) -> Tensor:
    """All of the memory that ``x`` is a view of, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def subjects(
    ops: list[Op], dtypes: list[torch.dtype], device: str, quick: bool
) -> list[tuple[Op, Case, torch.dtype, str]]:
    """What :class:`Subject` is built from, for everything asked for."""
    return [
        (op, case, dtype, device)
        for op in ops
        for dtype in dtypes
        if dtype in op.dtypes
        for case in cases(op, quick=quick)
        if takes(case, dtype)
    ]


def find_op(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    return OPS[name]


def find_dtype(dtype: torch.dtype | str) -> torch.dtype:
    named = {str(d).removeprefix("torch."): d for d in DTYPES}
    if dtype in DTYPES:
        return dtype
    if dtype not in named:
        raise ValueError(f"dtype must be one of {', '.join(named)}, got {dtype}")
    return named[dtype]


def find_device(device: str | None) -> str:
    device = device or "cpu"
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device must be cpu{' or cuda' if torch.cuda.is_available() else ''} here, got {device!r}")
    return device


def find_backends(backend: str | None, device: str) -> list[str]:
    """The named one; by default the reference and all that serve ``device``."""
    if backend is None:
        return ["reference", *(b.name for b in backends.BACKENDS if device in b.devices)]
    names = [n for n in backends.NAMES if n != "auto"]
    if backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, got {backend!r}")
    return [backend]
