"""Ops on DTensors, by groups of 2 and 4 processes; the checks are in sharding_checks.py and sharding_costs.py."""

from __future__ import annotations

import pytest
import ranks

CHECKS = {
    2: {
        "sharding_checks": ("over_slots", "other_axes", "bits_of_one_process", "compressed", "ties", "few_slots"),
        "sharding_costs": (
            "bytes_of_a_call",
            "derivatives",
            "refusals",
            "one_rank",
            "checked_ranks",
            "groups_that_are_gone",
            "low_precision",
        ),
    },
    4: {
        "sharding_checks": ("over_slots", "other_axes", "two_dimensions", "bits_of_one_process", "ties", "few_slots"),
        "sharding_costs": ("bytes_of_a_call",),
    },
}
NAMES = [(world, f"{m}.{name}") for world, checks in CHECKS.items() for m, names in checks.items() for name in names]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return ranks.Reports(NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world, name", NAMES)
def test_ranks_agree_with_one_process(reports, world, name):
    assert not reports.of(world)[name], reports.of(world)[name]
