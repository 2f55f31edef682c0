"""The cases of fuzz.py: an operator and its arguments, drawn from a number.

A case starts as a valid call, in which up to three things are then changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from memkernels.registration import OPS
from memkernels.spec import INTEGERS, Axis, Op, stats_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.bool, torch.int64, torch.int8, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.complex64)
SIZES = (0, 1, 1, 2, 3, 3, 5, 7, 8, 9, 17, 33, 65, 130)
LEADS = (1, 1, 2, 3, 5, 9)
BEYOND = (2**41, 2**62, 2**63 - 1)  # sizes that no memory holds: expanded tensors have them for free
FAR = (2**31, 2**36)  # sizes whose results no memory holds
WILD_INTS = (-(2**63), -(2**31), -1, 0, 1, 2**31, 2**40, 2**62, 2**63 - 1)
WILD_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e308, 1e-320)
SMALL = 1 << 20  # elements up to which a tensor is made without expanding


class Drawn:
    """One case while it is made."""

    def __init__(self, number: int):
        self.r = random.Random(number)
        torch.manual_seed(number)
        names = sorted(OPS)
        self.op: Op = OPS[self.r.choice(names)]
        self.direction = self.r.choice(self.op.suffixes)
        letters = {a.letter for arg in self.op.args for a in arg.parsed if a.letter}
        self.axes = {letter: self.r.choice(SIZES) for letter in sorted(letters)}
        if self.chance(0.03):
            self.axes[self.r.choice(sorted(letters))] = self.r.choice(BEYOND)
        scalars = [name for name, kind in self.op.params if kind == "int"]
        for name in scalars:
            self.axes[name] = self.r.choice(SIZES[1:])
        rank = self.r.choice((0, 0, 1, 1, 2, 3, 12)) if self.chance(0.95) else 13
        self.lead = [self.r.choice(LEADS) if i < 3 else 1 for i in range(rank)]
        if rank and self.chance(0.1):
            self.lead[self.r.randrange(rank)] = self.r.choice((0, 0, 4, *BEYOND))
        result = set(self.op.outputs[0].axes.split()) & {"T", "V"}
        indexed = any(a.dtype == "index" for a in self.op.args)
        if self.direction == "" and not indexed and {"T", "V"} <= result and self.axes["V"] > 0 and self.chance(0.02):
            self.axes["T"] = self.r.choice(FAR)
        self.dtype = self.r.choice(FLOATS)
        self.content = self.r.choice((self.dtype, stats_dtype(self.dtype)))
        self.memory = [n if self.chance(0.5) else 1 for n in self.lead]

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def size(self, axis: Axis) -> int:
        return min(axis.size(self.axes), 2**63 - 1)

    # --- tensors ---
    def leading(self, whole: list[int]) -> list[int]:
        """Leading dimensions that broadcast to ``whole``."""
        own = whole[self.r.randrange(len(whole) + 1) :] if self.chance(0.3) else list(whole)
        return [1 if self.chance(0.15) else n for n in own]

    def numbers(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.int64:
            return torch.randint(-1, max(self.slots(), 1), shape)
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, dtype=torch.uint8).view(torch.bool)
        if dtype in (torch.int8, torch.uint8, torch.int32):
            return torch.randint(0, 100, shape, dtype=dtype)
        x = torch.randn(shape) * self.r.choice((0.0, 1.0, 1.0, 30.0, 1e30))
        if self.chance(0.1):
            x[torch.rand(shape) < 0.2] = self.r.choice((float("nan"), float("inf"), -float("inf")))
        return x.to(dtype)

    def slots(self) -> int:
        """How many slots an index may name."""
        if "W" in self.axes:
            return self.axes["W"]
        n = self.axes["n"] ** 2 if "n" in self.axes else self.axes.get("N", 1)
        return min(n, 2**63 - 1)

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        try:
            return self.laid(shape, dtype)
        except RuntimeError:  # sizes that torch itself refuses
            return self.numbers([min(n, 3) for n in shape], dtype)

    def laid(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        total = 1
        for n in shape:
            total *= max(n, 1)
        form = self.r.choice(("plain", "plain", "permuted", "stepped", "gaps", "expanded", "overlapping", "strange"))
        if total > SMALL:
            return self.numbers([n if n < 200 else min(n, 1) for n in shape], dtype).expand(shape)
        if form == "permuted":
            order = self.r.sample(range(len(shape)), len(shape))
            back = sorted(range(len(shape)), key=order.__getitem__)
            return self.numbers([shape[d] for d in order], dtype).permute(back)
        if form == "stepped" and shape:
            return self.numbers([*shape[:-1], 2 * shape[-1]], dtype)[..., self.r.randrange(2) :: 2]
        if form == "gaps" and shape:
            return self.numbers([*shape[:-1], shape[-1] + 3], dtype)[..., self.r.randrange(4) :][..., : shape[-1]]
        if form == "expanded":
            return self.numbers([1 if self.chance(0.4) and n else n for n in shape], dtype).expand(shape)
        if form == "overlapping" and 0 not in shape:
            strides = [self.r.choice((0, 1, 1, 2, 3)) for _ in shape]
            length = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
            return self.numbers([length], dtype).as_strided(shape, strides)
        whole = self.numbers(shape, dtype)
        if form == "strange":  # any strides where a dimension has size 0 or 1
            wild = (2**62, 2**63 - 1, 0, 7)
            strides = [self.r.choice(wild) if n <= 1 else s for n, s in zip(shape, whole.stride())]
            return whole.as_strided(shape, strides)
        return whole

    def dtype_of(self, kind: str) -> torch.dtype:
        stats = stats_dtype(self.dtype)
        if kind == "mask":
            return self.r.choice((torch.bool, self.dtype, stats))
        if kind == "slots":
            return self.r.choice((torch.int8, torch.float8_e4m3fn))
        if kind == "table":
            return self.r.choice((*FLOATS, torch.int8, torch.float8_e4m3fn))
        if kind == "block_scale":
            return self.r.choice((torch.float32, torch.uint8))
        if kind in INTEGERS:
            return torch.int64
        table = {"bool": torch.bool, "content": self.content, "stats": stats, "scale": stats}
        return table.get(kind, self.dtype)

    # --- calls ---
    def arguments(self) -> list:
        op = self.op
        drawn: list = []
        for arg in op.args:
            whole = [] if arg.flat else self.memory if arg.side == "memory" else self.lead
            lead = list(whole) if self.direction == "_" and arg.name == op.inplace else self.leading(whole)
            tensor = self.tensor(lead + [self.size(a) for a in arg.parsed], self.dtype_of(arg.dtype))
            drawn.append(None if arg.optional and self.chance(0.4) else tensor)
        if self.direction == "_backward":
            by_name = {o.name: o for o in op.outputs}
            results = [(by_name[name], False) for name in op.saved] + [(o, True) for o in op.outputs if o.grad]
            for out, optional in results:
                lead = list(self.lead if out.lead == "all" else self.memory)
                kind = out.dtype if out.dtype in ("lead", "stats", "index") else op.args[op.index(out.dtype)].dtype
                shape = lead + [self.size(Axis.parse(a)) for a in out.axes.split()]
                tensor = self.tensor(shape, self.dtype_of(kind))
                drawn.append(None if optional and self.chance(0.2) else tensor)
        self.tensors = len(drawn)
        for name, kind in op.params:
            drawn.append(self.option(name, kind))
        if self.direction == "_backward":
            drawn.append([self.chance(0.8) for _ in op.differentiable])
        for _ in range(self.r.choice((0, 0, 1, 1, 2, 3))):
            self.r.choice(self.changes())(drawn)
        return drawn

    def option(self, name: str, kind: str):
        """An option, of a value that a call may have."""
        if kind == "int[]":
            return [self.r.randrange(1, 4) for _ in range(self.r.choice((1, 2, 3)))]
        if kind == "ScalarType":
            return self.dtype
        return {"int": lambda: self.axes[name], "float": lambda: 0.5, "bool": lambda: self.chance(0.5)}[kind]()

    def changes(self) -> list[Callable[[list], None]]:
        options = [self.other_dtype, self.other_size, self.other_rank, self.other_tensor, self.missing, self.shrunk]
        if any(a.dtype in INTEGERS for a in self.op.args) or "indices" in self.op.saved:
            options += [self.wild_index] * 3
        if self.op.params:
            options += [self.wild_number] * 2
        return options + [self.wants] * (self.direction == "_backward")

    def some(self, drawn: list) -> int:
        given = [i for i in range(self.tensors) if drawn[i] is not None]
        return self.r.choice(given) if given else 0

    def other_dtype(self, drawn: list) -> None:
        i = self.some(drawn)
        if drawn[i] is not None:
            drawn[i] = self.tensor(list(drawn[i].shape), self.r.choice(FLOATS + OTHERS))

    def other_size(self, drawn: list) -> None:
        i = self.some(drawn)
        if drawn[i] is None or drawn[i].dim() == 0:
            return
        shape = list(drawn[i].shape)
        d = self.r.randrange(len(shape))
        shape[d] = self.r.choice((0, 1, max(shape[d] - 1, 0), min(shape[d] + 1, 2**62), self.r.choice(BEYOND)))
        drawn[i] = self.tensor(shape, drawn[i].dtype)

    def other_rank(self, drawn: list) -> None:
        i = self.some(drawn)
        if drawn[i] is None:
            return
        shape = list(drawn[i].shape)
        drawn[i] = self.tensor(shape[1:] if self.chance(0.5) else [self.r.choice(LEADS), *shape], drawn[i].dtype)

    def other_tensor(self, drawn: list) -> None:
        drawn[self.some(drawn)] = drawn[self.some(drawn)]

    def missing(self, drawn: list) -> None:
        drawn[self.r.randrange(self.tensors)] = None

    def shrunk(self, drawn: list) -> None:
        i = self.some(drawn)
        if drawn[i] is not None:
            storage = drawn[i].untyped_storage()
            storage.resize_(self.r.choice((0, storage.nbytes() // 2, max(storage.nbytes() - 1, 0))))

    def wild_index(self, drawn: list) -> None:
        indices = [x for x in drawn[: self.tensors] if x is not None and x.dtype == torch.int64]
        indices = [x for x in indices if 0 < x.numel() < SMALL and x.untyped_storage().nbytes() > 0]
        if not indices:
            return
        x = self.r.choice(indices)
        at = tuple(self.r.randrange(n) for n in x.shape)
        end = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
        if end * 8 <= x.untyped_storage().nbytes():  # not shrunk: torch looks at the storage of the whole view
            x[at] = self.r.choice((self.slots(), *WILD_INTS)) if self.slots() < 2**63 - 1 else -2

    def wild_number(self, drawn: list) -> None:
        p = self.r.randrange(len(self.op.params))
        kind = self.op.params[p][1]
        wild = {"int": WILD_INTS, "float": WILD_FLOATS, "bool": (False, True)}
        wild |= {"int[]": ([], [0], [2**62], [1] * 1000), "ScalarType": OTHERS + FLOATS}
        wild = wild[kind]
        drawn[self.tensors + p] = self.r.choice(wild)

    def wants(self, drawn: list) -> None:
        n = len(self.op.differentiable)
        drawn[-1] = [self.chance(0.5) for _ in range(self.r.choice((0, n - 1, n, n + 1, 100)))]


def draw(number: int) -> tuple[str, list, int]:
    """Case ``number``: the name of the operator, its arguments, and the number of threads."""
    case = Drawn(number)
    return case.op.name + case.direction, case.arguments(), case.r.choice((1, 2, 4))
