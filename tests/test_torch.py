"""The operators with the tools of PyTorch: opcheck, torch.compile, torch.export, autocast, inference mode."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support import CASE, READY, close, operator, randn, subject

import memkernels as mk
from memkernels.registration import OPS
from memkernels.spec import several

B, T, N, K, V, k = 2, 9, 33, 16, 24, 4
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def samples(op: str):
    """Arguments for the raw operator: with the fewest and with all optional tensors."""
    cases = ["usual"]
    cases += ["float mask"] if any(a.name == "slot_mask" for a in OPS[op].args) else []
    cases += [case for case in ("erase tensor, both masks", "erase tensor, token mask") if CASE[case].fits(OPS[op])]
    for case in cases:
        inputs = subject(op, case, torch.float32).inputs
        yield case, inputs


@pytest.mark.parametrize("op", READY)
def test_opcheck(native, op):
    for _, inputs in samples(op):
        tensors = [
            t if t is None or not t.is_floating_point() else torch.nan_to_num(t).requires_grad_()
            for t in inputs.tensors
        ]
        torch.library.opcheck(operator(native, op), (*tensors, *inputs.params), test_utils=CHECKS)


@pytest.mark.parametrize("op", [op for op in READY if OPS[op].differentiable])
def test_opcheck_of_the_backward(native, op):
    declared = OPS[op]
    for _, inputs in samples(op):
        tensors = [t if t is None or not t.is_floating_point() else torch.nan_to_num(t) for t in inputs.tensors]
        results = several(operator(native, op)(*tensors, *inputs.params))
        saved = [results[[o.name for o in declared.outputs].index(name)] for name in declared.saved]
        cotangents = [torch.randn_like(r) for r, o in zip(results, declared.outputs) if o.grad]
        present = [t for t, a in zip(tensors, declared.args) if a.is_float]
        every = [t is not None and t.is_floating_point() for t in present]
        for wants in (every, [w and i == 0 for i, w in enumerate(every)]):
            arguments = (*tensors, *saved, *cotangents, *inputs.params, wants)
            torch.library.opcheck(operator(native, f"{op}_backward"), arguments, test_utils=CHECKS)
        one = [c if i == 0 else None for i, c in enumerate(cotangents)]
        torch.library.opcheck(
            operator(native, f"{op}_backward"), (*tensors, *saved, *one, *inputs.params, every), test_utils=CHECKS
        )


@pytest.mark.parametrize("op", [op for op in READY if OPS[op].inplace])
def test_opcheck_of_the_in_place_twin(native, op):
    for _, inputs in samples(op):
        tensors = [t if t is None or not t.is_floating_point() else torch.nan_to_num(t) for t in inputs.tensors]
        arguments = (*tensors, *inputs.params)
        torch.library.opcheck(operator(native, f"{op}_"), arguments, test_utils=("test_schema", "test_faketensor"))


# --- torch.compile and torch.export ---


def everything(query, keys, values, write, mask):
    """All operations, one into the next, as a model would use them."""
    read, lse = mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True)
    near, indices, weights = mk.topk_read(query, keys, values, k, slot_mask=mask, return_slots=True)
    scores, _ = mk.topk_search(query, keys, k, slot_mask=mask)
    again = mk.sparse_read(values, indices, weights)
    merged, whole = mk.merge_reads([read, near], [lse, torch.logsumexp(scores, -1)])
    new, retained = mk.gated_write(values, keys, query, write + merged, slot_mask=mask, return_retained=True)
    usage = mk.slot_usage(query, keys, lse, slot_mask=mask)
    gates = mk.address(query, keys, slot_mask=mask, gate="sigmoid")
    numbers = (x.sum() for x in (again, whole, retained, usage, gates))
    return new.square().sum() + sum(numbers)


def arguments(t: int = T, n: int = N, dtype=torch.float32):
    made = (
        randn(B, t, K, dtype=dtype),
        randn(B, n, K, dtype=dtype, seed=1),
        randn(B, n, V, dtype=dtype, seed=2),
        randn(B, t, V, dtype=dtype, seed=3),
        randn(B, n, dtype=dtype, seed=4),
    )
    return [x.requires_grad_() for x in made]


def value_and_gradients(function, leaves):
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def agree(compiled, leaves, tolerance=2e-5):
    wanted = value_and_gradients(everything, [x.detach().double().requires_grad_() for x in leaves])
    for got, want in zip(value_and_gradients(compiled, leaves), wanted):
        close(got.double(), want, tolerance)


@pytest.fixture
def fresh_compiler():
    # Do not use a graph of an older version of the library from the compiler's cache on disk.
    import torch.compiler.config

    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def test_compile_without_graph_breaks(backend, fresh_compiler):
    with mk.use_backend(backend):
        agree(torch.compile(everything, fullgraph=True, backend="aot_eager"), arguments())


def test_compile_of_product_keys_additive_scores_and_a_cache(backend, fresh_compiler):
    """With a mix that is a number and broadcast tokens, which become tensors inside the graph."""
    subkeys, logits = randn(2, 6, K // 2).float().requires_grad_(), randn(B, T, 40).float().requires_grad_()
    table = randn(36, 5).float().requires_grad_()
    words = torch.arange(k * 2) % 40

    def mixed(query, keys, values, write, mask):
        scores, slots = mk.product_key_search(query, subkeys, 2 * k)
        read = mk.additive_read(query, keys, values, query[0, 0], slot_mask=mask)
        loss = mk.cache_nll(logits, slots[..., 0], scores, words, 0.25)
        found, named, shares = mk.product_key_read(query, subkeys, table, k, return_slots=True)
        loss = loss + (found.sum(-1) * (named * shares).sum(-1))
        return loss.sum() + read.square().sum() + mk.cache_logprobs(logits, scores, words, 0.5).square().mean()

    leaves = [*arguments(), subkeys, logits, table]
    with mk.use_backend(backend):
        wanted = mixed(*leaves[:5])
        got = torch.compile(mixed, fullgraph=True, backend="aot_eager")(*leaves[:5])
    close(got.detach(), wanted.detach(), 1e-6)
    used = [leaves[i] for i in (0, 1, 2, 4, 5, 6, 7)]
    for one, other in zip(torch.autograd.grad(got, used), torch.autograd.grad(wanted, used)):
        close(one, other, 1e-6)


def test_compile_with_inductor(native, fresh_compiler):
    with mk.use_backend(native):
        agree(torch.compile(everything, fullgraph=True), arguments())


def test_compile_with_dynamic_shapes_compiles_once(native, fresh_compiler):
    """Not for the reference, which unrolls its loop over tokens."""
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with mk.use_backend(native):
        compiled = torch.compile(everything, fullgraph=True, backend=frames, dynamic=True)
        agree(compiled, arguments(T, N))
        first = frames.frame_count  # may include a restart within the first compilation
        for t, n in ((5, 40), (17, 64)):
            agree(compiled, arguments(t, n))
    assert frames.frame_count == first


def test_compile_of_a_write_in_place(backend, fresh_compiler):
    query, keys, values, write, _ = (x.detach() for x in arguments())

    def step(values):
        return mk.gated_write_(values, keys, query, write, erase=0.5, backend=backend) * 2.0

    one, other = values.clone(), values.clone()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(one)
    close(got, step(other), 1e-6)
    close(one, other, 1e-6)


class Model(torch.nn.Module):
    def forward(self, query, keys, values, write):
        read = mk.softmax_read(query, keys, values)
        near = mk.topk_read(query, keys, values, k)
        return read + near, mk.gated_write(values, keys, query, write, erase=0.5)


def test_export(native):
    example = tuple(x.detach() for x in arguments()[:4])
    tokens, slots = torch.export.Dim("tokens", min=2, max=512), torch.export.Dim("slots", min=8, max=4096)
    shapes = ({1: tokens}, {1: slots}, {1: slots}, {1: tokens})
    with mk.use_backend(native):
        program = torch.export.export(Model(), example, dynamic_shapes=shapes)
        names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert {f"memkernels_{native}.{op}.default" for op in ("softmax_read", "topk_read", "gated_write")} <= names
        for t, n in ((T, N), (20, 65)):
            inputs = tuple(x.detach() for x in arguments(t, n)[:4])
            for got, want in zip(program.module()(*inputs), Model()(*(x.double() for x in inputs))):
                close(got.double(), want, 2e-5)


def test_meta_and_fake_tensors_give_shapes_and_dtypes_of_the_reference(native):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op in READY:
        declared = OPS[op]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            s = subject(op, "content in float32" if dtype == torch.bfloat16 and "values" in op else "usual", dtype)
            wanted = declared.reference(*s.inputs.tensors, *s.inputs.params)
            with FakeTensorMode() as mode:
                fakes = [t if t is None else mode.from_tensor(t) for t in s.inputs.tensors]
                results = several(operator(native, op)(*fakes, *s.inputs.params))
            assert [(r.shape, r.dtype) for r in results] == [(w.shape, w.dtype) for w in wanted]


# --- autocast, inference mode ---


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_runs_reads_in_the_low_dtype(backend, low):
    query, keys, values, *_ = arguments()
    with torch.autocast("cpu", dtype=low), mk.use_backend(backend):
        read, lse = mk.softmax_read(query, keys, values, return_lse=True)
        near = mk.topk_read(query, keys, values, k)
        weights = mk.address(query, keys)
    assert read.dtype == near.dtype == weights.dtype == low and lse.dtype == torch.float32
    read.float().sum().backward()
    assert query.grad.dtype == torch.float32
    exact = mk.softmax_read(*(x.detach().to(low).double() for x in (query, keys, values)), backend="reference")
    close(read.detach().double(), exact, 1e-2)


def test_autocast_leaves_the_memory_in_its_own_dtype(backend):
    query, keys, values, write, _ = (x.detach() for x in arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = mk.gated_write(values, keys, query, write.bfloat16(), backend=backend)
    assert new.dtype == torch.float32
    exact = [x.double() for x in (values, keys.bfloat16(), query.bfloat16(), write.bfloat16())]
    close(new.double(), mk.gated_write(*exact, backend="reference"), 1e-2)


def test_autocast_compiles(backend, fresh_compiler):
    query, keys, values, *_ = (x.detach() for x in arguments())

    def read(q, x, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mk.softmax_read(q, x, v, backend=backend)

    got = torch.compile(read, fullgraph=True, backend="aot_eager")(query, keys, values)
    assert got.dtype == torch.bfloat16
    close(got.float(), mk.softmax_read(query, keys, values, backend="reference"), 2e-2)


def test_results_under_no_grad_and_inference_mode_are_the_same(backend):
    query, keys, values, *_ = arguments()
    recorded = mk.softmax_read(query, keys, values, backend=backend)
    assert recorded.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = mk.softmax_read(query, keys, values, backend=backend)
        assert not plain.requires_grad
        assert torch.equal(plain, recorded.detach())


def test_named_backend_wins_over_use_backend_and_the_environment():
    query, keys, values, *_ = (x.detach() for x in arguments())
    with mk.use_backend("cpu"), torch.profiler.profile() as profile:
        mk.softmax_read(query, keys, values, backend="reference")
    assert not any("memkernels_cpu" in e.name for e in profile.events())
    with mk.use_backend("reference"):
        with mk.use_backend("auto"), torch.profiler.profile() as profile:
            mk.softmax_read(query, keys, values)
        assert any("memkernels_cpu" in e.name for e in profile.events())
        assert mk.backends.requested() == "reference"
    with (
        pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton, cuda, got 'gpu'"),
        mk.use_backend("gpu"),
    ):
        pass
