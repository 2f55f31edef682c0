"""Modules and stores over groups of 2 and 4 processes; the checks are in sharding_modules.py and sharding_stores.py."""

from __future__ import annotations

import pytest
import ranks

CHECKS = {
    2: ("slot_parallel", "fsdp", "ddp", "compiled", "dealt_out"),
    4: ("slot_parallel", "two_dimensions", "checkpoints", "dealt_out"),
}
NAMES = [(world, f"sharding_modules.{name}") for world, names in CHECKS.items() for name in names]
NAMES.append((4, "sharding_stores.stores"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return ranks.Reports(NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world, name", NAMES)
def test_ranks_agree_with_one_process(reports, world, name):
    assert not reports.of(world)[name], reports.of(world)[name]
