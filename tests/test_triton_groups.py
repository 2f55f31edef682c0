"""Arguments of Triton kernels that come in groups: what is assumed of each member, and what a launch hands over."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from memkernels import _triton

pytest.importorskip("triton")
builds = importlib.import_module(f"{_triton.kernels().__name__}.builds")


class Source(NamedTuple):
    q: Any
    norm: Any


class Sizes(NamedTuple):
    T: Any
    parts: Any
    inner: Any


def built(*arguments, aligned: bool = True):
    """What a launch with these arguments compiles."""
    names = ("source", "sizes", "N", "BLOCK")
    params = [SimpleNamespace(name=name, is_constexpr=name.isupper() and len(name) > 1) for name in names]
    return builds.build(SimpleNamespace(params=params), [*arguments], {"num_warps": 4}, 90, lambda x: aligned)


def rows(*strides: int) -> tuple:
    return (torch.empty(0, dtype=torch.bfloat16, device="meta"), *strides)


def test_members_of_a_group_are_specialised_as_arguments_of_their_own_are():
    """By their names where they are numbers, by alignment where they are tensors; None and a last stride of 1 are
    constants."""
    numbers = torch.empty(0, device="meta")
    build = built(Source(rows(4096, 64, 1), (numbers, numbers)), Sizes(32, 16, None), 40, 128)
    assert build.signature == {
        "source": (("*bf16", "i32", "i32", "constexpr"), ("*fp32", "*fp32")),
        "sizes": ("i32", "i32", "constexpr"),
        "N": "i32",
        "BLOCK": "constexpr",
    }
    assert [type(build.signature[name]) for name in ("source", "sizes")] == [Source, Sizes], "kernels read fields"
    assert build.constants == {(0, 0, 3): 1, (1, 2): None, (3,): 128}
    assert set(build.attributes) == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 0)}
    assert not build.odd


@pytest.mark.parametrize(
    ("source", "aligned"), [(Source(rows(4096, 60), None), True), (Source(rows(4096, 64), None), False)]
)
def test_rows_in_a_group_that_are_not_aligned_are_odd_rows(source, aligned):
    build = built(source, Sizes(32, 16, None), 48, 128, aligned=aligned)
    assert build.odd and build.options["maxnreg"] == 255
    assert set(build.attributes) == {(1, 0), (2,)}


def test_the_machine_code_takes_no_group_and_no_constant():
    arguments = [Source(rows(4096, 64, 1), (torch.empty(0), torch.empty(1))), Sizes(32, 16, None), 40, 128]
    build = built(*arguments)
    assert build.types == ("*bf16", "i32", "i32", "*fp32", "*fp32", "i32", "i32", "i32")
    q, norm = arguments[0]
    given = build.taken(arguments)
    assert all(x is y for x, y in zip([given[0], *given[3:5]], [q[0], *norm]))
    assert [*given[1:3], *given[5:]] == [4096, 64, 32, 16, 40]


def test_a_launch_hands_over_what_the_parameters_of_the_machine_code_are():
    """In their order: so the C function that launches a kernel may be one of plain numbers."""
    compile = pytest.importorskip("bench.compile")
    found = next(
        noted.build
        for one in compile.launches(torch.bfloat16, 64, "meta")
        if one.name == "gated_write, erase 0.5, retained"
        for noted in compile.launched(one, "90")
        if noted.kernel == "write_token_kernel"
    )
    kernel = found.compile()
    params = re.findall(r"\.param \.(\w+)(?: \.ptr)?[^,)]*_param_\d+", kernel.asm["ptx"].split(")", 1)[0])
    kinds = {"*": "u64", "i32": "u32", "i64": "u64", "fp32": "f32"}
    assert params[:-2] == [kinds.get(kind, kinds["*"]) for kind in found.types]  # the last two are Triton's own
    assert tuple(kernel.src.signature.values()) == found.types
