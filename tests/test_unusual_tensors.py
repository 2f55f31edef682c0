"""Tensors that no kernel takes, and other objects: one sentence that names op, argument, wanted and got."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from calls import OPERATIONS, B, arguments, run
from support import close

import memkernels as mk
from memkernels.registration import OPS
from memkernels.spec import MAX_LEAD, Arg

TENSORS = [
    (op, name) for op in OPERATIONS for name, x in arguments(op, masks=True).items() if isinstance(x, torch.Tensor)
]


class Wrapper(torch.Tensor):
    """A tensor with a dispatch of its own, which has no rule for the operators of memkernels."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError("no rule")


class Named(torch.Tensor):
    """A subclass of Tensor that changes nothing."""


def declared(op: str, name: str) -> Arg:
    own = OPS[op.removesuffix("_")]
    return own.args[own.index(name)]


def _sentence(error: BaseException, op: str, name: str) -> None:
    text = str(error)
    what = re.escape(op.removesuffix("_"))
    assert re.match(rf"{what}_?(_compressed)?: (leading dimensions of )?{name} (must|has) .*, got [^\n]+$", text), text


def _refused(op: str, name: str, given: dict, value, backend: str | None, kinds=(TypeError, ValueError)) -> None:
    before = {n: x.clone() for n, x in given.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(kinds) as caught:
        run(op, backend, **{**given, name: value})
    _sentence(caught.value, op, name)
    assert all(torch.equal(given[n], x) for n, x in before.items())


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_dense_tensor_on_the_same_device_is_refused(backend, op, name):
    given = arguments(op, masks=True)
    run(op, backend, **given)  # the plan of these shapes is kept, and must not accept other kinds of tensors
    given = arguments(op, masks=True)
    x = given[name]
    flat = x.reshape(-1, *x.shape[-1:]) if x.dim() < 2 else x
    jagged = torch.nested.nested_tensor([flat[0], flat[0]], layout=torch.jagged)
    ragged = torch.nested.nested_tensor([flat[0], flat[0]])
    others = [x.tolist(), x.numpy(), 3.5j, "text", jagged, ragged, x.to_sparse(), x.to(torch.complex64)]
    if x.is_floating_point():
        others += [torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)]
    if not declared(op, name).optional:
        others += [None]
    if x.dim() > 1:
        others += [torch.ones_like(x).to_sparse_csr()]
    for other in others:
        _refused(op, name, given, other, backend)
    with pytest.raises(ValueError, match=rf"^{op}?: \w+ must be on (cpu|meta), got (meta|cpu)$"):
        run(op, backend, **{**given, name: x.to("meta")})


@pytest.mark.parametrize("op", OPERATIONS)
def test_more_leading_dimensions_than_kernels_have_room_for(backend, op):
    given = {n: x[:1] if isinstance(x, torch.Tensor) and n not in ("reads", "lses") else x
             for n, x in arguments(op).items()}  # fmt: skip
    if op == "merge_reads":
        given = {n: x[:, :1] for n, x in given.items()}

    def lift(x, dims):
        if not isinstance(x, torch.Tensor):
            return x
        return (
            x.reshape(len(x), *(1,) * (dims - 1), *x.shape[1:])
            if op == "merge_reads"
            else x.reshape(*(1,) * (dims - 1), *x.shape)
        )

    flat = {a.name for a in OPS[op.removesuffix("_")].args if a.flat}
    given = {n: arguments(op)[n] if n in flat else x for n, x in given.items()}
    room = MAX_LEAD + 2 - max(2, *(len(a.parsed) for a in OPS[op.removesuffix("_")].args))
    for fits in (2, room):
        run(op, backend, **{n: x if n in flat else lift(x, fits) for n, x in given.items()})
    for many in (room + 1, 20):
        sentence = rf"^{op}?: \w+ must have at most {room} leading dimensions, got {many}, \["
        with pytest.raises(ValueError, match=sentence):
            run(op, backend, **{n: x if n in flat else lift(x, many) for n, x in given.items()})


@pytest.mark.parametrize(
    ("op", "name"), [t for t in TENSORS if t[1] not in ("slot_mask", "token_mask") and t[0] != "merge_reads"]
)  # merge_reads stacks the reads, which the tensor's own dispatch handles
def test_a_tensor_with_its_own_dispatch_is_refused_by_name(native, op, name):
    given = arguments(op)
    given[name] = Wrapper(given[name])
    with pytest.raises(TypeError) as caught:
        run(op, native, **given)
    _sentence(caught.value, op, name)
    assert str(caught.value).endswith("got Wrapper")


def test_a_distributed_tensor_is_taken(native):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given = arguments("softmax_read")
        sharded = {n: DTensor.from_local(x, mesh) for n, x in given.items()}
        for changed in (sharded, {**given, "keys": sharded["keys"]}):
            for got, wanted in zip(run("softmax_read", native, **changed), run("softmax_read", native, **given)):
                assert torch.equal(got.to_local() if isinstance(got, DTensor) else got, wanted)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("op", OPERATIONS)
def test_subclasses_without_their_own_dispatch_work(backend, op):
    given = arguments(op)
    wanted = run(op, "reference", **arguments(op, torch.float64))
    named = {n: x.as_subclass(Named) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    for got, want in zip(run(op, backend, **named), wanted):
        close(got.as_subclass(torch.Tensor).double(), want.double(), 1e-5)


def test_what_cannot_be_a_backend_is_refused():
    for wrong in (3, ["cpu"], {}, "tpu"):
        with pytest.raises((ValueError, TypeError), match="backend must be one of auto, reference, cpu"):
            run("softmax_read", wrong, **arguments("softmax_read"))


def test_parts_that_cannot_be_merged_are_refused():
    lses = torch.zeros(2, B, 5)
    for wrong in (3, None, "text", [1, 2], [[1.0]], np.zeros((2, 2, 5, 6))):
        with pytest.raises(TypeError, match=r"^merge_reads: reads must .*, got \w+$"):
            mk.merge_reads(wrong, lses)
