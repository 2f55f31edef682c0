"""The cases at their quick sizes under pytest-benchmark, and the guard against regressions.

    python -m pytest bench --benchmark-enable --benchmark-only

The guard compares ratios to a peer, measured interleaved, with those of the last committed result of this kind of
machine (``python -m bench --quick`` writes one). Absolute times of different days say little.
"""

from __future__ import annotations

import pytest
import torch

from . import results
from .case import Case
from .cases import select
from .ceilings import Ceilings
from .harness import Settings, run_case
from .variants import d_output, own, prepare

SETTINGS = Settings("cpu", torch.get_num_threads(), quick=True)
CASES = [case for case in select([]) if case.measure == "time"]


@pytest.fixture(scope="session")
def where() -> dict:
    return results.environment(SETTINGS.device, SETTINGS.threads)


@pytest.fixture(scope="session")
def ceilings(where) -> Ceilings:
    found = Ceilings(SETTINGS.device, SETTINGS.threads, SETTINGS.quick, where["isa"])
    found.refresh()
    return found


def name(case: Case) -> str:
    return f"{case.op}-{case.direction}-{case.dtype}-{case.title(case.quick)}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_case(case, benchmark, ceilings, where):
    row = results.complete(run_case(case, SETTINGS), case, ceilings, where)
    if not row["backend"]:
        pytest.skip(row["why"])
    assert not row["why"]
    inputs = case.make(case.quick, case.torch_dtype, SETTINGS.device, seed=0)
    call = prepare(case, own(case), inputs, d_output(case, inputs))
    iterations = max(1, int(1e-3 / row["median"]))
    benchmark.group = f"{case.op} {case.direction}"
    benchmark.extra_info.update(
        {field: row[field] for field in ("best_peer", "ratio", "peak_share", "bandwidth_share")}
    )
    with torch.set_grad_enabled(case.autograd):
        benchmark.pedantic(call, rounds=10, warmup_rounds=1, iterations=iterations)
    for _, before, now in results.compare([row], results.committed()):
        assert now >= results.GUARD * before, f"{now:.2f}x the best peer before, which was {before:.2f}x"
