"""Which backend a call gets: that of its own thread's or task's block, and one with the kernels it needs."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch
import torch._dynamo.testing
from support import READY, close, randn, subject

import memkernels as mk
from memkernels import backends, registration
from memkernels.backends import requested
from memkernels.registration import OPS
from memkernels.spec import several

QUERY, KEYS, VALUES = randn(2, 5, 8), randn(2, 9, 8), randn(2, 9, 6)


# --- threads and tasks ---


def test_overlapping_blocks_of_two_threads():
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with mk.use_backend("reference"):
            first_in.set()
            assert second_in.wait(10)
            seen["first"] = requested()
        first_out.set()

    def second():
        assert first_in.wait(10)
        seen["before"] = requested()
        with mk.use_backend("cpu"):
            second_in.set()
            assert first_out.wait(10)
            seen["second"] = requested()
        seen["after"] = requested()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "before": "auto", "second": "cpu", "after": "auto"}
    assert requested() == "auto"


def test_a_new_thread_begins_with_the_default():
    seen = []
    with mk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_overlapping_blocks_of_tasks():
    async def task(name, before, after):
        await asyncio.sleep(before)
        with mk.use_backend(name):
            await asyncio.sleep(after)
            return requested()

    async def run():
        with mk.use_backend("triton"):
            tasks = [asyncio.create_task(task(*x)) for x in (("cpu", 0, 0.02), ("reference", 0.01, 0.03))]
            inherited = asyncio.create_task(inherits())
            thread = asyncio.to_thread(requested)
        found = await asyncio.gather(*tasks)
        return found, await inherited, await thread, requested()

    async def inherits():
        await asyncio.sleep(0.01)
        return requested()

    found, inherited, thread, after = asyncio.run(run())
    assert found == ["cpu", "reference"]
    assert inherited == "triton"  # a task keeps the block that it was created in
    assert thread == after == "auto"  # to_thread copies the context when it is awaited


# --- generators ---


def stream(name):
    with mk.use_backend(name):
        while True:
            yield requested()


def test_a_suspended_generator_keeps_its_block_to_itself():
    one, other = stream("cpu"), stream("reference")
    assert (next(one), requested(), next(other), requested()) == ("cpu", "auto", "reference", "auto")
    with mk.use_backend("triton"):
        assert (next(one), next(other), requested()) == ("cpu", "reference", "triton")
        one.close()
        assert (next(other), requested()) == ("reference", "triton")
    del other
    assert requested() == "auto"
    assert backends._blocks.get() == ()


def test_a_generator_within_a_generator():
    def outer():
        with mk.use_backend("reference"):
            yield requested()
            yield from stream("cpu")

    def calls():
        for name in outer():
            yield name, requested()

    found = calls()
    assert [next(found) for _ in range(3)] == [("reference", "auto"), ("cpu", "auto"), ("cpu", "auto")]


def test_a_block_in_a_function_that_a_generator_calls_comes_first():
    def inner():
        with mk.use_backend("cpu"):
            return requested()

    def generator():
        with mk.use_backend("reference"):
            yield requested(), inner(), requested()

    assert next(generator()) == ("reference", "cpu", "reference")


def test_asynchronous_generators():
    async def asynchronous(name):
        with mk.use_backend(name):
            while True:
                await asyncio.sleep(0)
                yield requested()

    async def run():
        one, other = asynchronous("cpu"), asynchronous("reference")
        found = [await anext(one), requested(), await anext(other), requested(), await anext(one)]
        await one.aclose()
        found += [await anext(other), requested()]
        await other.aclose()
        return found

    assert asyncio.run(run()) == ["cpu", "auto", "reference", "auto", "cpu", "reference", "auto"]


@contextlib.contextmanager
def own_context(name):
    with mk.use_backend(name):
        yield


def test_a_context_manager_made_of_a_generator_is_a_block_of_its_user():
    with own_context("reference"):
        assert requested() == "reference"
        with own_context("cpu"):
            assert requested() == "cpu"
        assert requested() == "reference"
    assert requested() == "auto"

    def generator():
        with own_context("reference"):
            yield requested()

    found = generator()
    assert next(found) == "reference" and requested() == "auto"

    class Own:
        @contextlib.asynccontextmanager
        async def context(self):
            with mk.use_backend("reference"):
                yield

    async def run():
        async with Own().context():
            return requested()

    assert asyncio.run(run()) == "reference"


@pytest.fixture
def in_reference():
    with mk.use_backend("reference"):
        yield


def test_a_fixture_is_a_block_of_its_test(in_reference):
    assert requested() == "reference"
    assert next(stream("cpu")) == "cpu"
    assert requested() == "reference"


def test_an_exit_stack_and_a_decorator():
    stack = contextlib.ExitStack()
    stack.enter_context(mk.use_backend("reference"))
    assert requested() == "reference"
    stack.enter_context(mk.use_backend("cpu"))
    assert requested() == "cpu"
    stack.close()

    @mk.use_backend("reference")
    def function():
        return requested()

    assert (function(), function(), requested()) == ("reference", "reference", "auto")
    with pytest.raises(ZeroDivisionError), mk.use_backend("cpu"):
        raise ZeroDivisionError
    assert requested() == "auto"


# --- compiled code and the backward pass ---


def nodes(counter):
    return [[str(n.target) for n in g.graph.nodes if "memkernels" in str(n.target)] for g in counter.graphs]


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def test_compiled_code_notices_another_backend(native, counter):
    compiled = torch.compile(lambda q: mk.softmax_read(q, KEYS, VALUES), fullgraph=True, backend=counter)
    kernel = [f"memkernels_{native}.softmax_read.default"]
    with mk.use_backend("reference"):
        wanted = compiled(QUERY)
        assert nodes(counter) == [[]]
    for _ in range(2):
        with mk.use_backend(native):
            close(compiled(QUERY), wanted)
        assert nodes(counter) == [[], kernel]
        with mk.use_backend("reference"):
            compiled(QUERY)
    found = []
    thread = threading.Thread(target=lambda: found.append(compiled(QUERY)))
    with mk.use_backend("reference"):
        thread.start()
        thread.join()
    close(found[0], wanted)
    assert nodes(counter)[:2] == [[], kernel]


def test_blocks_inside_compiled_code(native, counter):
    def step(q):
        with mk.use_backend("reference"), mk.use_backend(native):
            read = mk.softmax_read(q, KEYS, VALUES)
        with mk.use_backend("reference"):
            return read + mk.softmax_read(q, KEYS, VALUES)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for name in ("reference", "auto"):
        with mk.use_backend(name):
            close(compiled(QUERY), step(QUERY))
            assert requested() == name
    assert nodes(counter)[0] == [f"memkernels_{native}.softmax_read.default"]
    assert requested() == "auto"


def test_the_backward_pass_keeps_the_backend_of_the_call(native):
    q = QUERY.clone().requires_grad_()
    with mk.use_backend(native):
        read = mk.softmax_read(q, KEYS, VALUES)
    with mk.use_backend("reference"):
        plain = mk.softmax_read(q, KEYS, VALUES)

    def names(result):
        with torch.profiler.profile() as profile:
            result.sum().backward()
        return {e.name for e in profile.events() if "memkernels" in e.name}

    with mk.use_backend("reference"):
        assert f"memkernels_{native}::softmax_read_backward" in names(read)
    with mk.use_backend(native):
        assert not names(plain)
    close(q.grad, 2 * torch.autograd.grad(mk.softmax_read(q, KEYS, VALUES, backend="reference").sum(), q)[0])


# --- a backend that has the forward and not the backward ---


@pytest.fixture
def forward_only(monkeypatch):
    """The kernels of the cpu backend without those of the backward passes and of the in-place twins."""
    kept = {(name, device) for name, device in backends._kernels if not name.endswith(("_backward", "_"))}
    monkeypatch.setattr(backends, "_kernels", kept)


@pytest.mark.parametrize("op", [op for op in READY if OPS[op].differentiable])
def test_auto_takes_no_backend_without_the_backward_where_gradients_are_wanted(forward_only, op):
    inputs = subject(op, "usual").inputs
    declared, named = OPS[op], f"memkernels_cpu::{op}"

    def profiled(tensors, backend="auto"):
        with torch.profiler.profile() as profile:
            results = registration.call(declared, tensors, tuple(inputs.params), backend)
        return results, {e.name for e in profile.events()}

    plain = list(inputs.tensors)
    place = next(i for i, a in enumerate(declared.args) if a.is_float and plain[i].is_floating_point())
    leaf = plain[place].clone().requires_grad_()
    wanting = [*plain[:place], leaf, *plain[place + 1 :]]

    assert named in profiled(plain)[1]
    results, names = profiled(wanting)
    assert named not in names
    sum(torch.nan_to_num(r).sum() for r in several(results) if r.requires_grad).backward()
    assert leaf.grad is not None

    with torch.no_grad():
        assert named in profiled(wanting)[1]
    with pytest.raises(NotImplementedError, match=f"^{op}: backend 'cpu' has no backward kernel on cpu$"):
        profiled(wanting, "cpu")
    with torch.no_grad():
        assert named in profiled(wanting, "cpu")[1]


def test_compiled_code_takes_none_either(forward_only, counter):
    compiled = torch.compile(lambda q: mk.softmax_read(q, KEYS, VALUES), fullgraph=True, backend=counter)
    compiled(QUERY)
    compiled(QUERY.clone().requires_grad_()).sum().backward()
    assert nodes(counter) == [["memkernels_cpu.softmax_read.default"], []]


def test_auto_takes_no_backend_without_the_twin_for_a_write_in_place(forward_only):
    values, weights, write = VALUES.clone(), torch.rand(2, 4, 9).double(), randn(2, 4, 6)
    with torch.profiler.profile() as profile:
        mk.slot_write_(values, weights, write)
    assert not any("memkernels_cpu" in e.name for e in profile.events())
    close(values, mk.slot_write(VALUES, weights, write, backend="reference"))
    with pytest.raises(NotImplementedError, match="^slot_write: backend 'cpu' has no in-place kernel on cpu$"):
        mk.slot_write_(values, weights, write, backend="cpu")
