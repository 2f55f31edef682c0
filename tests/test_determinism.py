"""The same inputs give the same bits: run after run, for any number of threads, from several Python threads at once."""

from __future__ import annotations

import threading

import pytest
import torch
from support import CASE, READY, bits, operator

from memkernels.registration import OPS
from memkernels.spec import several
from memkernels.testing import Case, Subject

# Large enough that kernels split tokens, slots and widths over threads, forward or backward.
LARGE = (
    Case("many tokens", sizes={"T": 700, "N": 600, "K": 40, "V": 72, "k": 9, "S": 5}, tokens=(), memory=()),
    Case("few tokens", sizes={"T": 3, "N": 9001, "K": 40, "V": 72, "k": 9, "S": 5}, tokens=(), memory=()),
    Case("shared memory", sizes={"T": 65, "N": 900, "K": 24, "V": 24, "k": 9}, tokens=(2, 3), memory=(3,)),
    CASE["usual"],
    CASE["float mask"],
)
ERASE = Case(
    "erase tensor", ("erase",), {"T": 129, "N": 515, "K": 40, "V": 72}, tokens=(), memory=(), give={"erase": "uniform"}
)


def runs() -> list:
    found = []
    for op in (OPS[name] for name in READY):
        for case in (*LARGE, ERASE):
            if case.fits(op):
                for dtype in op.dtypes if case.name == "many tokens" else op.dtypes[:2]:
                    found.append(pytest.param(op.name, case, dtype, id=f"{op.name}-{case.name}-{str(dtype)[6:]}"))
    return found


def evaluate(op: str, case: Case, dtype: torch.dtype, backend: str, offset: int = 0):
    """A function that runs forward and backward once and returns all results as bytes.

    offset: how many numbers lie before each tensor in its memory.
    """
    s = Subject(OPS[op], case, dtype, "cpu")
    run = operator(backend, op)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)

    def once() -> list[bytes]:
        tensors = [t if t is None else (moved(t) if offset else t).detach() for t in s.inputs.tensors]
        leaves = [tensors[i].requires_grad_() for i in s.wanting]
        results = several(run(*tensors, *s.inputs.params))
        pairs = [(results[i], d) for i, d in s.cotangents(results).items()]
        gradients = torch.autograd.grad([r for r, _ in pairs], leaves, [d for _, d in pairs]) if leaves else ()
        return [bits(x) for x in (*results, *gradients)]

    return once


@pytest.mark.parametrize(("op", "case", "dtype"), runs())
def test_same_bits_for_every_run_and_number_of_threads(native, threads, op, case, dtype):
    once = evaluate(op, case, dtype, native)
    threads(1)
    wanted = once()
    assert once() == wanted, "run to run"
    for n in (2, 3, 8):
        threads(n)
        assert once() == wanted, f"{n} threads"


@pytest.mark.parametrize("op", READY)
def test_same_bits_from_several_python_threads_at_once(native, op):
    once = evaluate(op, CASE["usual"], torch.float32, native)
    wanted, failures = once(), []

    def work():
        for _ in range(15):
            try:
                if once() != wanted:
                    failures.append("other bits")
            except Exception as error:  # a thread that dies must fail the test
                failures.append(repr(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("op", READY)
def test_same_bits_wherever_the_memory_lies(native, op):
    """Kernels may not depend on the alignment of a pointer."""
    wanted, *others = (evaluate(op, CASE["usual"], torch.float32, native, offset)() for offset in (0, 1, 3))
    assert all(found == wanted for found in others)
