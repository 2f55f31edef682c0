"""Options: what counts as a number, and tensors in place of numbers, with their gradients."""

from __future__ import annotations

import fractions
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from calls import CHOOSING, ERASING, MIXING, SCALED, B, T, arguments, k, run
from support import close, randn

from memkernels.registration import OPS
from memkernels.testing import TOLERANCE

HALF = (
    0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.array(0.5), fractions.Fraction(1, 2),
    torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.bfloat16),
    torch.nn.Parameter(torch.tensor(0.5)),
)  # fmt: skip
NO_NUMBER = (
    ("0.5", "str"), (b"1", "bytes"), (True, "bool"), (np.bool_(True), "bool"), (1j, "complex"),
    (np.complex128(1), "complex128"), (np.str_("0.5"), "str_"), ([0.5], "list"), (np.array([0.5, 1]), "ndarray"),
    (torch.tensor(True), "a tensor [] of bool"), (torch.tensor(1j), "a tensor [] of complex64"), ({}, "dict"),
)  # fmt: skip
NO_VALUE = ((math.nan, "nan"), (10**400, "an int beyond the range of float64"), (np.float32("nan"), "nan"))
OPTIONS = (
    *((op, "scale", "a number or a tensor that broadcasts to [..., T]") for op in SCALED),
    *((op, "erase", "a number or a tensor [..., T, V]") for op in ERASING),
    *((op, "mix", "a number or a tensor [..., T]") for op in MIXING),
)
HEADED = tuple(op for op in SCALED if not op.endswith("_"))


@pytest.mark.parametrize(("op", "option", "wanted"), OPTIONS)
def test_every_kind_of_number_is_read_as_one(backend, op, option, wanted):
    exact = [x.double() for x in run(op, "reference", **{**arguments(op, torch.float64), option: 0.5})]
    for half in HALF:
        if op.endswith("_") and getattr(half, "requires_grad", False):
            continue
        for got, want in zip(run(op, backend, **{**arguments(op), option: half}), exact):
            close(got.detach().double(), want, 1e-5)


@pytest.mark.parametrize(("op", "option", "wanted"), OPTIONS)
def test_what_is_no_number_is_refused_in_one_sentence(op, option, wanted):
    given = arguments(op)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    for value, got in NO_NUMBER:
        with pytest.raises(TypeError) as caught:
            run(op, **{**given, option: value})
        assert str(caught.value) == f"{op}: {option} must be {wanted}, got {got}"
    for value, got in NO_VALUE:
        with pytest.raises(ValueError, match=f"^{op}: {option} must be .*, got {got}$"):
            run(op, **{**given, option: value})
    assert all(torch.equal(given[name], x) for name, x in before.items())
    if option != "scale":
        for value in (-0.1, 1.5, None, torch.tensor(1.5), torch.tensor(math.nan), np.float32(2)):
            with pytest.raises((ValueError, TypeError), match=rf"^{op}: {option} must be (in \[0, 1\]|a number)"):
                run(op, **{**given, option: value})


@pytest.mark.parametrize("op", CHOOSING)
def test_k_is_any_integer_and_nothing_else(backend, op):
    given = arguments(op)
    wanted = run(op, "reference", **given)
    for number in (np.int64(k), np.uint8(k), torch.tensor(k), torch.tensor(k, dtype=torch.uint8), np.array(k)):
        for got, want in zip(run(op, backend, **{**given, "k": number}), wanted):
            close(got.double(), want.double(), 1e-5)
    for wrong in ("3", 3.0, True, None, np.bool_(True), torch.tensor(3.0), torch.tensor([3]), torch.tensor(True), [3]):
        with pytest.raises(TypeError, match=f"^{op}: k must be an int, got .+$"):
            run(op, backend, **{**given, "k": wrong})
    for wrong, sentence in (
        (0, "at least 1, got 0"),
        (-(10**400), "at least 1"),
        (10**400, "at most 92233720368547758"),
    ):
        with pytest.raises(ValueError, match=f"^{op}: k must be {sentence}"):
            run(op, backend, **{**given, "k": wrong})


# --- a scale that is a tensor ---


def one_by_one(op: str, given: dict, scale: torch.Tensor) -> list[torch.Tensor]:
    """The results of the reference in float64 with numbers as scale: one call for each stream and token."""
    given = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in given.items()}
    streams = []
    for b in range(B):
        factors = scale.double().expand(B, T)[b].tolist()
        own = {n: x[b] if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        tokens = [a.name for a in OPS[op].args if a.side == "tokens" and isinstance(own.get(a.name), torch.Tensor)]
        parts = []
        for t, factor in enumerate(factors):
            step = {**own, **{n: own[n][t : t + 1] for n in tokens}}
            results = run(op, "reference", **step, scale=factor)
            if op in ("gated_write", "softmax_write"):
                own["values"] = results[0]
            elif op == "memory_scan":
                own["values"] = results[1]
            parts.append(results)
        if op in ("gated_write", "softmax_write"):
            streams.append(parts[-1])
        elif op == "memory_scan":
            streams.append([torch.cat([p[0] for p in parts]), parts[-1][1]])
        elif op == "slot_usage":
            streams.append([sum(p[0] for p in parts)])
        else:
            streams.append([torch.cat(p) for p in zip(*parts)])
    return [torch.stack(x) for x in zip(*streams)]


SHAPES = ((), (1,), (T,), (B, 1), (B, T), (1, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", HEADED)
def test_a_scale_for_each_stream_or_token(backend, op, dtype):
    given = arguments(op, dtype)
    for shape in SHAPES:
        scale = 0.2 + randn(*shape).abs()
        for kind in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
            wanted = one_by_one(op, given, scale.to(kind))
            got = run(op, backend, **given, scale=scale.to(kind))
            if op in CHOOSING and dtype in (torch.bfloat16, torch.float16):  # close scores may rank either way
                got, wanted = got[:1], wanted[:1]
            for one, want in zip(got, wanted):
                close(one.double(), want.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("op", HEADED)
@pytest.mark.parametrize("shape", [(), (B, 1), (B, T)])
def test_a_scale_has_its_gradient_of_first_and_second_order(backend, op, shape):
    given = arguments(op, torch.float64)
    query = "read_query" if op == "memory_scan" else "query"

    def function(scale, lead):
        results = run(op, backend, **{**given, query: lead}, scale=scale)
        return tuple(x for x in results if x.is_floating_point())

    inputs = ((0.5 + randn(*shape).abs()).requires_grad_(), given[query].clone().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", HEADED)
def test_the_gradient_of_a_float32_scale_beside_16_bit_queries(backend, op, dtype):
    given = arguments(op, dtype)
    scale = torch.nn.Parameter(torch.tensor([[0.4], [0.7]]))
    got = run(op, backend, **given, scale=scale)[0]
    got.float().square().sum().backward()
    assert scale.grad.dtype == torch.float32
    exact = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in given.items()}
    twin = scale.detach().double().requires_grad_()
    run(op, "reference", **exact, scale=twin)[0].square().sum().backward()
    close(scale.grad.double(), twin.grad, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("op", HEADED)
def test_a_scale_that_does_not_fit_says_so(backend, op):
    given = arguments(op)
    for shape in ((3,), (B, 3), (1, B, 1), (3, T), (B, T, 1)):
        with pytest.raises(ValueError) as caught:
            run(op, backend, **given, scale=torch.ones(shape))
        assert str(caught.value) == f"{op}: scale must broadcast to [{B}, {T}], [..., T], got {list(shape)}"
    with pytest.raises(TypeError, match=f"^{op}: scale must be float32, got float64$"):
        run(op, backend, **given, scale=torch.ones(B, 1).double())
    with pytest.raises(TypeError, match=f"^{op}: scale must be float32, got int64$"):
        run(op, backend, **given, scale=torch.ones(T, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"^{op}: scale must be on cpu, got meta$"):
        run(op, backend, **given, scale=torch.ones(B, 1, device="meta"))
    with pytest.raises(TypeError, match=f"^{op}: scale must be a number or .*, got .* on meta$"):
        run(op, backend, **given, scale=torch.ones((), device="meta"))
    for kind in (torch.ones(B, T).to_sparse(), torch.nested.nested_tensor([torch.ones(T)] * B, layout=torch.jagged)):
        with pytest.raises(
            TypeError, match=f"^{op}: scale must be a number or a tensor that broadcasts to .*, got a .*"
        ):
            run(op, backend, **given, scale=kind)


def test_a_scale_may_have_what_only_the_memory_has(backend):
    """One query for two memories, each with a temperature of its own."""
    given = arguments("softmax_read")
    given["query"] = given["query"][0]
    scale = torch.tensor([[0.3], [0.9]])
    got = run("softmax_read", backend, **given, scale=scale)[0]
    for b in range(B):
        own = {n: (x if n == "query" else x[b]).double() for n, x in given.items()}
        close(got[b].double(), run("softmax_read", "reference", **own, scale=scale[b].item())[0], 1e-5)


@pytest.mark.parametrize("op", ["softmax_read", "topk_read", "topk_search"])
def test_a_scale_beside_compressed_slots(backend, op):
    given = arguments(op)
    scale, row = torch.tensor([[0.3], [0.9]], requires_grad=True), torch.full((B, given["keys"].shape[1]), 1 / 64)
    rows = {"key_scale": row} | ({"value_scale": row} if "values" in given else {})
    for name in ("keys", "values"):
        if name in given:
            given[name] = (given[name] * 40).round().clamp(-127, 127).to(torch.int8)
    got = run(op, backend, **given, **rows, scale=scale)[0]
    plain = {n: x.double() / 64 if n in ("keys", "values") else x for n, x in given.items()}
    twin = scale.detach().double().requires_grad_()
    want = run(op, "reference", **{**plain, "query": plain["query"].double()}, scale=twin)[0]
    close(got.detach().double(), want.detach(), 1e-5)
    close(torch.autograd.grad(got.sum(), scale)[0].double(), torch.autograd.grad(want.sum(), twin)[0], 1e-5)


def test_a_scale_that_needs_a_gradient_is_refused_in_place():
    for op in ("gated_write_", "softmax_write_"):
        with pytest.raises(RuntimeError, match=f"^{op}: no argument may require a gradient, got one"):
            run(op, **arguments(op), scale=torch.ones((), requires_grad=True))


# --- erase and mix that are one number in a tensor ---


@pytest.mark.parametrize("op", [op for op in ERASING if not op.endswith("_")])
def test_erase_as_one_number_that_is_learned(backend, op):
    given = arguments(op, torch.float64)
    erase = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    close(run(op, backend, **given, erase=erase)[0].detach(), run(op, "reference", **given, erase=0.6)[0], 1e-12)
    assert torch.autograd.gradcheck(lambda e: run(op, backend, **given, erase=e)[0], erase)
    assert torch.autograd.gradgradcheck(lambda e: run(op, backend, **given, erase=e)[0], erase)
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.tensor(0.6))
        new = run(op, backend, **arguments(op, dtype), erase=parameter)[0]
        exact = run(op, "reference", **arguments(op, torch.float64), erase=0.6)[0]
        close(new.detach().double(), exact, 3 * TOLERANCE[dtype])
        new.float().sum().backward()
        assert parameter.grad.dtype == torch.float32 and parameter.grad


@pytest.mark.parametrize("op", MIXING)
def test_mix_as_one_number_that_is_learned(backend, op):
    given = arguments(op, torch.float64)
    mix = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    wanted = run(op, "reference", **{**given, "mix": 0.3})[0]
    close(run(op, backend, **{**given, "mix": mix})[0].detach(), wanted, 1e-12)
    assert torch.autograd.gradcheck(lambda m: run(op, backend, **{**given, "mix": m})[0], mix)
    assert torch.autograd.gradgradcheck(lambda m: run(op, backend, **{**given, "mix": m})[0], mix)


# --- transforms and compilation ---


def test_tangents_and_transforms_reach_the_scale():
    given = arguments("softmax_read", torch.float64)
    scale, tangent = torch.tensor(0.4, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

    def read(s):
        return run("softmax_read", **given, scale=s)[0].square().sum()

    step = 1e-6
    slope = (read(scale + step) - read(scale - step)) / (2 * step)
    close(torch.func.jvp(read, (scale,), (tangent,))[1], slope, 1e-6)
    close(torch.func.grad(read)(scale), slope, 1e-6)
    several = torch.tensor([0.2, 0.4, 1.0], dtype=torch.float64)
    close(torch.func.vmap(read)(several), torch.stack([read(s) for s in several]), 1e-12)


@pytest.mark.parametrize("kind", ["number", "without gradient", "parameter", "per head", "dynamic"])
@pytest.mark.parametrize("op", ["softmax_read", "product_key_read", "gated_write", "memory_scan"])
def test_a_scale_compiles_in_one_graph(op, kind):
    torch._dynamo.reset()
    given = arguments(op)
    scale = {
        "number": 0.7,
        "without gradient": torch.tensor(0.7),
        "parameter": torch.nn.Parameter(torch.tensor(0.7)),
        "per head": torch.full((B, 1), 0.7, requires_grad=True),
        "dynamic": torch.full((B, 1), 0.7),
    }[kind]

    def function(scale, given):
        return run(op, "cpu", **given, scale=scale)[0]

    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=frames, dynamic=kind == "dynamic" or None)
    got = compiled(scale, given)
    exact = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in given.items()}
    close(got.detach().double(), run(op, "reference", **exact, scale=0.7)[0], 1e-5)
    if isinstance(scale, torch.Tensor):
        first = frames.frame_count
        compiled((scale * 2).detach().requires_grad_(scale.requires_grad), given)  # another number, the same graph
        assert frames.frame_count == first or isinstance(scale, torch.nn.Parameter)
