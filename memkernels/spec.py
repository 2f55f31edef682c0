"""What an operation is: its axes, tensors, options, results, and the one checker of all four.

An op module declares an :class:`Op`. Everything that can be derived from the declaration is derived here or in
``registration.py``: shape and dtype checks, result shapes, the schema of its torch operators, fake kernels, the
contract grid of ``testing/`` and the op table of the documentation. A declaration also has what the tests need: how an
argument is filled, what a mask hides, how a result is judged.

Axes, the same letters everywhere: ``T`` tokens, ``N`` slots, ``K`` key width, ``V`` value width, ``k`` neighbours,
``S`` parts to merge, ``D`` channels of a state, ``n`` half keys of a list, ``B`` branches, ``M`` hash tables. A number
(``2``) is a fixed size, a number and a letter (``3D``) a multiple, a letter twice (``nn``) a square. Leading dimensions
come before them and broadcast. A tensor belongs to the *tokens* or to the *memory*; a leading dimension that every
memory tensor lacks (or has at size 1) is *shared*: its tokens are folded into ``T`` in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _torch
from ._axes import Axis, letters, sizes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPRESSED = (torch.int8, torch.float8_e4m3fn)
MAX_LEAD = 12  # leading dimensions that kernels have room for, beside the two axes of most arguments
_NAMES = {d: str(d).removeprefix("torch.") for d in (*FLOATS, torch.bool, torch.int64, *COMPRESSED, torch.uint8)}


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Arg:
    """One tensor argument.

    axes: its trailing axes, for instance ``"N K"``.
    side: ``"tokens"`` or ``"memory"``.
    dtype: one of
        ``"lead"``: any of FLOATS; sets the dtype of the call;
        ``"same"``: as the lead;
        ``"content"``: as the lead, or float32 beside a 16-bit lead; all content arguments agree;
        ``"stats"``: float32, or float64 for float64;
        ``"mask"``: bool, or float that is added to the scores;
        ``"bool"``;
        ``"index"``, ``"range"``: int64; calls take int32 too. A range has the slots that a token may address;
        ``"slots"``: 8 bits, or the lead, or float32 beside a 16-bit lead; never differentiable;
        ``"scale"``: what multiplies the rows of such an argument;
        ``"table"``: any of FLOATS, whatever the dtype of the call, or 8 bits; only floats are differentiable;
        ``"block_scale"``: what multiplies blocks of columns of a table, float32 or the bits of float8_e8m0fnu in uint8.
    stretch: a last axis of size 1 is stretched.
    flat: it has no leading dimensions, whatever those of the call.
    of: for an index the axis that it points into (``""``: none, it is any number from -1 on), for a scale the argument
        whose rows it multiplies.

    For the tests:

    fill: how it is filled where a case does not say: a name of ``testing.inputs.FILL``, or a function of all tensors
        and options of the call, itself drawn in the usual way of its dtype. ``""`` is that usual way.
    hides: where it is False or -inf, nothing may look at the arguments of its side whose axes begin with its own, and
        the grid puts NaN there. A mask always does.
    """

    name: str
    axes: str
    side: str
    dtype: str = "same"
    optional: bool = False
    stretch: bool = False
    flat: bool = False
    of: str = "N"
    fill: str | Callable[..., Tensor] = ""
    hides: bool = False
    parsed: tuple[Axis, ...] = field(init=False, repr=False)  # ``axes``, parsed once, because every call checks them

    def __post_init__(self):
        object.__setattr__(self, "parsed", tuple(map(Axis.parse, self.axes.split())))
        object.__setattr__(self, "hides", self.hides or self.dtype == "mask")

    @property
    def is_float(self) -> bool:
        """May it have a gradient?"""
        return self.dtype not in ("bool", "index", "range", "slots", "scale", "block_scale")


@dataclass(frozen=True)
class Out:
    """One result.

    lead: the leading dimensions of ``"all"`` arguments or of the ``"memory"``.
    dtype: ``"lead"``, ``"stats"``, ``"index"``, or the name of the argument whose dtype it has.
    grad: may it have a gradient?
    of: for an index the axis that it points into; ``""``: none.
    positive: a sum of positive terms. Nothing cancels, so each number must be accurate, however small it is.
    judged: False for a result that only the backward kernel uses and that has no unique right value.
    judge: for the slots that an op chose, the scores that rank them, ``[..., T, slots]``, as a function of all tensors
        and options. Slots whose scores differ by rounding may rank either way. Without a judge an index must be that
        of the reference.
    """

    name: str
    axes: str
    lead: str = "all"
    dtype: str = "lead"
    grad: bool = True
    of: str = "N"
    positive: bool = False
    judged: bool = True
    judge: Callable[..., Tensor] | None = None


# The rounding error of a log-sum-exp. lse is an exact maximum plus the logarithm of a sum; where the maximum is large,
# the error is as large as that logarithm. The backward pass forms weights as exp((s - lse) - lse_rest).
LSE_REST = Out("lse_rest", "T", dtype="stats", grad=False, judged=False)


def bare(results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...] | None:
    """``results`` as an operator of torch returns them: a single one bare, and none as None."""
    return tuple(results) if len(results) > 1 else results[0] if results else None


def several(results: Any) -> tuple[Tensor, ...]:
    """What an operator of torch, or a function over one, returned, as a tuple: undoes :func:`bare`."""
    if isinstance(results, (tuple, list)):
        return tuple(results)
    return () if results is None else (results,)


@dataclass(frozen=True)
class Op:
    """The declaration of an operation.

    reference: plain PyTorch, called as ``reference(*tensors, *params)``, returns one tensor per result.
    selected: for an op that chooses slots, the reference with the choice given, called as
        ``selected(*tensors, *params, indices)``: scores that differ by rounding may rank either way, the rest follows.
    params: (name, schema type) of the options that are not tensors, e.g. ``("scale", "float")``. An int is the size of
        the axis of its name. A ``("dtype", "ScalarType")`` is the dtype of the call where no argument is its lead; a
        call without either is one on integers.
    usual: option -> its value in tests that do not say, or a function of the sizes of the axes; see
        :meth:`usual_option`.
    traits: what else a case of the grid may need beside axes, arguments, options and results, such as ``"gates"``.
    saved: results that the backward kernel takes as inputs.
    autocast: arguments cast to the autocast dtype while autocast is on.
    twin_of: for an op over compressed slots, the op over float ones; it is called through that one's function.
    inplace: name of the argument that a twin operator ``<name>_`` overwrites with the result of the same name.
    over_slots: how shards of the slots on several ranks make the result of the whole (``sharding.py``):
        ``"lse"``: their reads merge through their lse;
        ``"best"``: the k best of the k best of every shard;
        ``"rows"``: each shard serves the rows that it holds;
        ``"whole"``: not at all, a call needs all slots at once;
        ``""``: every slot is by itself, and all results have one entry per slot.
    flops, backward_flops: of the axes' sizes, the operations that an exact method needs for one stream, forward and for
        all gradients; a multiply-add is two of them. None: not counted.
    """

    name: str
    args: tuple[Arg, ...]
    outputs: tuple[Out, ...]
    reference: Callable[..., tuple[Tensor, ...]]
    params: tuple[tuple[str, str], ...] = ()
    saved: tuple[str, ...] = ()
    autocast: tuple[str, ...] = ()
    inplace: str | None = None
    selected: Callable[..., tuple[Tensor, ...]] | None = None
    flops: Callable[[Mapping[str, int]], int] | None = None
    backward_flops: Callable[[Mapping[str, int]], int] | None = None
    equation: str = ""
    twin_of: str = ""
    over_slots: str = ""
    usual: Mapping[str, object] = field(default_factory=dict, hash=False)
    traits: tuple[str, ...] = ()
    slots: str | None = field(init=False, repr=False)  # the axis of slots, "N" or "nn"; None: it has none
    queries: tuple[int, ...] = field(init=False, repr=False)  # positions of the arguments that ``scale`` multiplies
    typed: int | None = field(init=False, repr=False)  # position among the options of the one that sets the dtype

    def __post_init__(self):
        places = tuple(i for i, a in enumerate(self.args) if a.name.endswith("query"))
        object.__setattr__(self, "queries", places)
        memory = {axis for a in self.args if a.side == "memory" for axis in a.axes.split()}
        object.__setattr__(self, "slots", next((axis for axis in ("N", "nn") if axis in memory), None))
        typed = next((i for i, (_, kind) in enumerate(self.params) if kind == "ScalarType"), None)
        object.__setattr__(self, "typed", typed)

    def formula(self, *inputs):
        """The reference, whose results are those of an operator of torch: a single one is bare."""
        return bare(self.reference(*inputs))

    @property
    def differentiable(self) -> tuple[Arg, ...]:
        return tuple(a for a in self.args if a.is_float)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that a call may have."""
        leads = self.typed is not None or any(a.dtype == "lead" for a in self.args)
        return FLOATS if leads else (torch.int64,)

    @property
    def directions(self) -> tuple[str, ...]:
        """What a backend may have kernels for: an op on integers has no backward pass."""
        return ("forward", "backward") if self.differentiable else ("forward",)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What ends the names of its operators."""
        return ("", *(["_backward"] if self.differentiable else []), *(["_"] if self.inplace else []))

    @property
    def choice(self) -> Out | None:
        """The result that tells which slots were chosen, of an op that chooses any."""
        return None if self.selected is None else next(o for o in self.outputs if o.dtype == "index")

    def index(self, name: str | None) -> int:
        return next(i for i, a in enumerate(self.args) if a.name == name)

    def usual_option(self, name: str, axes: Mapping[str, int], dtype: torch.dtype = torch.float32) -> object:
        """The value of an option in tests that do not say, where ``axes`` gives each letter its size.

        dtype: of the call.
        """
        if name in self.usual:
            usual = self.usual[name]
            return usual(axes) if callable(usual) else usual
        if name == "scale":
            return max(axes["K"], 1) ** -0.5
        kind = dict(self.params)[name]
        return axes[name] if kind == "int" else {"float": 1.0, "bool": False, "ScalarType": dtype}[kind]


@dataclass(frozen=True)
class Layout:
    """What the shapes of one call bind: axis sizes, leading dimensions of the call and of the memory alone."""

    axes: dict[str, int]
    lead: tuple[int, ...]
    memory: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """How many tokens share one memory."""
        streams = math.prod(self.memory)
        return 0 if _torch.known(streams == 0) else self.axes.get("T", 1) * math.prod(self.lead) // streams

    def shape(self, op: Op, out: Out, tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], torch.dtype]:
        lead = self.lead if out.lead == "all" else self.memory
        if out.dtype in ("lead", "stats", "index"):
            dtype = {"lead": self.dtype, "stats": stats_dtype(self.dtype), "index": torch.int64}[out.dtype]
        else:
            like = tensors[op.index(out.dtype)]
            assert like is not None
            dtype = like.dtype
        return (*lead, *sizes(out.axes, self.axes)), dtype


def _broadcast(op: Op, shapes: list[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    result: list[int] = []
    for name, shape in shapes:
        result = [1] * (len(shape) - len(result)) + result
        offset = len(result) - len(shape)
        for i, size in enumerate(shape):
            if _torch.known(result[offset + i] == 1):
                result[offset + i] = size
            elif _torch.known(size != 1) and _torch.known(size != result[offset + i]):
                raise ValueError(
                    f"{op.name}: leading dimensions of {name} must broadcast to {result}, got {list(shape)}"
                )
    return tuple(result)


def _check_masks(op: Op, shapes: list[tuple[Arg, tuple[int, ...]]], lead: tuple[int, ...]) -> None:
    """Refuse leading dimensions that only masks or ranges have: a mask was meant as ``[T, N]``, and is ``[..., N]``."""
    for arg, shape in shapes:
        own = lead[len(lead) - len(shape) :]
        if len(shape) > len(lead) or any(size != whole and size != 1 for size, whole in zip(shape, own)):
            raise ValueError(
                f"{op.name}: leading dimensions of {arg.name} must broadcast to {list(lead)}, those of the other "
                f"arguments, got {list(shape)}"
            )


def shaped(*tensors: object) -> bool:
    """Are all of them tensors with sizes? A nested tensor has none. If one is not, the check of the call raises."""
    return all(isinstance(t, Tensor) and not t.is_nested for t in tensors)


def _kind(tensor: Tensor) -> str | None:
    """The kind of a tensor without plain strided memory, None for others."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def _kind_text(op: Op, arg: Arg, kind: str) -> str:
    return f"{op.name}: {arg.name} must be a dense tensor [..., {', '.join(arg.axes.split())}], got {kind}"


def check_kinds(op: Op, tensors: Sequence[Tensor | None]) -> None:
    """Refuse nested and sparse tensors in one sentence."""
    for arg, tensor in zip(op.args, tensors):
        if isinstance(tensor, Tensor) and (kind := _kind(tensor)) is not None:
            raise TypeError(_kind_text(op, arg, kind))


def unusual(op: Op, tensors: Sequence[object]) -> str | None:
    """The sentence that says which of ``tensors`` no kernel takes, for a call that failed."""
    for arg, tensor in zip(op.args, tensors):
        if not isinstance(tensor, Tensor):
            continue
        kind = _kind(tensor)
        if _torch.is_dtensor(tensor):
            continue
        if kind is None and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            kind = type(tensor).__name__
        if kind is not None:
            return _kind_text(op, arg, kind)
    return None


def _axes_text(arg: Arg, axes: dict[str, int]) -> str:
    named = zip(arg.axes.split(), arg.parsed)
    return "[..., " + ", ".join(f"{n}={a.size(axes)}" if a.letter in axes else n for n, a in named) + "]"


INTEGERS = ("index", "range")  # kinds of arguments that are int64, and int32 in calls

# What arguments of these kinds may be, whatever the dtype of the call.
_ANY_CALL = {
    "bool": (torch.bool,),
    "index": (torch.int64,),
    "range": (torch.int64,),
    "lead": FLOATS,
    "table": (*FLOATS, *COMPRESSED),
    "block_scale": (torch.float32, torch.uint8),
}


def _check_dtype(op: Op, arg: Arg, tensor: Tensor, lead: torch.dtype, content: Tensor | None) -> None:
    """``lead``: the dtype of the call."""
    wanted: tuple[torch.dtype, ...]
    if arg.dtype in _ANY_CALL:
        wanted = _ANY_CALL[arg.dtype]
    elif arg.dtype == "same":
        wanted = (lead,)
    elif arg.dtype == "slots":
        wanted = (lead, stats_dtype(lead), *COMPRESSED)
    elif arg.dtype in ("stats", "scale"):
        wanted = (stats_dtype(lead),)
    elif arg.dtype == "mask":
        wanted = (torch.bool, lead, stats_dtype(lead))
    elif content is not None and content is not tensor:
        wanted = (content.dtype,)
    else:
        wanted = (lead, stats_dtype(lead))
    if tensor.dtype not in wanted:
        names = " or ".join(dict.fromkeys(_NAMES[d] for d in wanted)) + " or int32" * (arg.dtype in INTEGERS)
        raise TypeError(f"{op.name}: {arg.name} must be {names}, got {_NAMES.get(tensor.dtype, tensor.dtype)}")


def check(op: Op, tensors: Sequence[Tensor | None], params: Sequence[Any] = ()) -> Layout:
    """Bind the axes of ``op`` to ``tensors`` or raise the one sentence that says what is wrong."""
    axes: dict[str, int] = {name: value for (name, kind), value in zip(op.params, params) if kind == "int"}
    leader, lead = next(((a, t) for a, t in zip(op.args, tensors) if a.dtype == "lead"), (op.args[0], tensors[0]))
    lead = lead if isinstance(lead, Tensor) else None
    dtype = torch.int64 if op.typed is None else params[op.typed]
    if leader.dtype == "lead" and lead is not None:  # first, because the others are checked against it
        _check_dtype(op, leader, lead, lead.dtype, None)
        dtype = lead.dtype
    content = next((t for a, t in zip(op.args, tensors) if a.dtype == "content" and isinstance(t, Tensor)), None)
    leads: list[tuple[str, tuple[int, ...]]] = []
    memory: list[tuple[str, tuple[int, ...]]] = []
    masks: list[tuple[Arg, tuple[int, ...]]] = []
    for arg, tensor in zip(op.args, tensors):
        if tensor is None and arg.optional:
            continue
        tensor = _check_tensor(op, arg, tensor, lead, dtype, content)
        own = _bind(op, arg, tuple(tensor.shape), axes)
        if arg.dtype in ("mask", "bool", "scale", "range"):
            masks.append((arg, own))
        else:
            leads.append((arg.name, own))
        if arg.side == "memory":
            memory.append((arg.name, own))
    whole = _broadcast(op, leads)
    _check_masks(op, masks, whole)
    return Layout(axes, whole, _broadcast(op, memory) if memory else whole, dtype)


def _check_tensor(
    op: Op, arg: Arg, tensor: object, lead: Tensor | None, dtype: torch.dtype, content: Tensor | None
) -> Tensor:
    """``tensor``, if it is a dense tensor of a dtype and on a device that fit the lead and the dtype of the call."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op.name}: {arg.name} must be a tensor, got {type(tensor).__name__}")
    _check_dtype(op, arg, tensor, tensor.dtype if lead is None else dtype, content)
    if lead is not None and tensor.device != lead.device:
        raise ValueError(f"{op.name}: {arg.name} must be on {lead.device}, got {tensor.device}")
    if (kind := _kind(tensor)) is not None:
        raise TypeError(_kind_text(op, arg, kind))
    return tensor


def _bind(op: Op, arg: Arg, shape: tuple[int, ...], axes: dict[str, int]) -> tuple[int, ...]:
    """Check the trailing axes of one argument and add new ones to ``axes``. Returns the leading dimensions."""
    split = len(shape) - len(arg.parsed)
    fits = split >= 0
    for i, axis in enumerate(arg.parsed if fits else ()):
        size = shape[split + i]
        if axis.letter and axis.letter not in axes:
            axes[axis.letter] = size // axis.factor
        if _torch.known(size != axis.size(axes)):
            stretched = arg.stretch and i == len(arg.parsed) - 1 and _torch.known(size == 1)
            fits = fits and stretched
    if not fits:
        known = {a: n for a, n in axes.items() if any(a in letters(b.axes) for b in op.args if b.name != arg.name)}
        raise ValueError(f"{op.name}: {arg.name} must be {_axes_text(arg, known)}, got {list(shape)}")
    if arg.flat and split:
        raise ValueError(f"{op.name}: {arg.name} must be [{', '.join(arg.axes.split())}], got {list(shape)}")
    room = MAX_LEAD + 2 - max(2, *(len(a.parsed) for a in op.args))
    if split > room:
        raise ValueError(
            f"{op.name}: {arg.name} must have at most {room} leading dimensions, got {split}, {list(shape)}"
        )
    return shape[:split]
