"""Helpers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from promised import PROMISED

import memkernels as mk
from memkernels.backends import BACKENDS as ROWS
from memkernels.registration import OPS
from memkernels.testing import CASES, Subject

ROOT = Path(mk.__file__).resolve().parent.parent
BACKENDS = ("reference", *(b.name for b in ROWS if "cpu" in b.devices))
NATIVE = tuple(b for b in BACKENDS if b != "reference")
CASE = {case.name: case for case in CASES}


def has(op: str, backend: str, direction: str = "forward") -> bool:
    """Is there a kernel, or must there be one, because the op is promised? The reference has all directions."""
    row = next((b for b in ROWS if b.name == backend), None)
    return row is None or op in PROMISED or row.gap(op, "cpu", direction=direction) is None


def _complete(op: str, backend: str) -> bool:
    return all(has(op, backend, d) for d in (*OPS[op].directions, *(["in-place"] if OPS[op].inplace else [])))


# Ops whose native operators can be called in every direction: the promised ones, and others once they have kernels.
READY = tuple(op for op in OPS if all(_complete(op, backend) for backend in NATIVE))


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` of the largest number; infinities and NaN in the same places."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    finite = wanted[torch.isfinite(wanted)]
    size = max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * size, equal_nan=True)


def operator(backend: str, name: str):
    """The raw torch operator of a backend, without the checks of the public function."""
    row = next(b for b in ROWS if b.name == backend)
    assert row.missing() is None, row.missing()  # missing() loads its library
    return getattr(getattr(torch.ops, row.namespace), name).default


def bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def subject(op: str, case: str, dtype: torch.dtype = torch.float64) -> Subject:
    """Inputs of a case of the contract grid."""
    return Subject(OPS[op], CASE[case], dtype, "cpu")


def run_python(code: str, *args: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter that can import this memkernels and the helpers of the tests."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
