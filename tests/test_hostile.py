"""Native entry points called directly: arguments that do not fit are refused, and nothing crashes the process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_python

from memkernels.registration import OPS

CALLS = [(op, d) for op in OPS for d in ("forward", "backward", *(["in place"] if OPS[op].inplace else []))]
CODE = (Path(__file__).parent / "hostile.py").read_text()


@pytest.mark.parametrize(("op", "direction"), CALLS)
def test_hostile_arguments_raise_and_never_crash(native, op, direction):
    done = run_python(CODE, op, native, direction)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines and lines[-1] == "DONE", f"died at {lines[-1:]}: {done.stderr[-2000:]}"
    accepted = [line for line in lines if line.startswith("ACCEPTED")]
    assert not accepted, "\n".join(accepted)
    assert len(lines) > 30
