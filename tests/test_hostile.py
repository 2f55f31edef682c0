"""Native entry points called directly: arguments that do not fit are refused, and nothing crashes the process."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support import READY, run_python

from memkernels.registration import OPS

CALLS = [(op, d) for op in READY for d in (*OPS[op].directions, *(["in place"] if OPS[op].inplace else []))]
CODE = (Path(__file__).parent / "hostile.py").read_text()
# Every call has a process of its own, because it may crash. Processes are forked from one that has imported torch.
FORK = """
import json, os, sys, tempfile, traceback
import memkernels, support

code, backend, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
result = []
for op, direction in calls:
    with tempfile.TemporaryFile("w+") as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.argv = ["", op, backend, direction]
            try:
                exec(compile(code, "hostile.py", "exec"), {"__name__": "__main__"})
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        result.append((status, said.read()))
print(json.dumps(result))
"""


@functools.cache
def ends(backend: str) -> dict[tuple[str, str], tuple[int, str]]:
    """How each call ended, and what it said."""
    done = run_python(FORK, CODE, backend, json.dumps(CALLS), timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CALLS, json.loads(done.stdout)))


@pytest.mark.parametrize(("op", "direction"), CALLS)
def test_hostile_arguments_raise_and_never_crash(native, op, direction):
    status, said = ends(native)[op, direction]
    lines = said.splitlines()
    assert status == 0 and lines and lines[-1] == "DONE", f"died with status {status}: {said[-2000:]}"
    accepted = [line for line in lines if line.startswith("ACCEPTED")]
    assert not accepted, "\n".join(accepted)
    assert len(lines) > 30
