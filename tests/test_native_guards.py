"""The guards of the native operators, called without the checks of Python, on tensors with false sizes or strides."""

from __future__ import annotations

import pytest
import torch
from support import operator


def refused(what: str, name: str, *arguments) -> None:
    with pytest.raises(RuntimeError) as caught:
        operator("cpu", name)(*arguments)
    assert str(caught.value) == what


@pytest.mark.parametrize("bytes_left", [0, 100, 64 * 16 * 4 - 1])
def test_tensors_whose_storage_ends_too_early(bytes_left):
    keys = torch.randn(64, 16)
    keys.untyped_storage().resize_(bytes_left)
    refused(
        f"softmax_read: keys reaches beyond its storage of {bytes_left} bytes",
        *("softmax_read", torch.randn(3, 16), keys, torch.randn(64, 16), None, None, 0.25),
    )


def test_a_storage_that_ends_with_the_last_element_is_enough():
    whole = torch.randn(64, 16)
    keys = whole[:, :3]
    keys.untyped_storage().resize_((63 * 16 + 3) * 4)
    query, values = torch.randn(5, 3), torch.randn(64, 2)
    got, *_ = operator("cpu", "softmax_read")(query, keys, values, None, None, 0.5)
    wanted = torch.softmax(query.double() @ keys.double().T / 2, -1) @ values.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "strides"), [((6, 4), (0, 1)), ((6, 4), (1, 1)), ((6, 4), (3, 1)), ((2, 6, 4), (4, 4, 1))]
)
def test_a_memory_that_overlaps_itself_is_not_written(shape, strides):
    values = torch.zeros(100).as_strided(shape, strides)
    lead, (N, V) = shape[:-2], shape[-2:]
    weights, write = torch.rand(*lead, 3, N), torch.randn(*lead, 3, V)
    what = "slot_write_: values must not be expanded, nor overlap themselves"
    refused(what, "slot_write_", values, weights, write, None, None, 1.0)


@pytest.mark.parametrize("strides", [(4, 1), (9, 2), (1, 6)])
def test_other_memories_are_written_as_they_lie(strides):
    values = torch.zeros(100).as_strided((6, 4), strides)
    weights, write = torch.rand(1, 6), torch.randn(1, 4)
    operator("cpu", "slot_write_")(values, weights, write, None, None, 1.0)
    torch.testing.assert_close(values, weights.T @ write)


def test_strides_of_single_rows_may_be_any_number():
    far = 2**62
    query = torch.randn(1, 8).as_strided((1, 1, 8), (far, far, 1))
    keys, values = torch.randn(5, 8), torch.randn(5, 3)
    got, *_ = operator("cpu", "softmax_read")(query, keys, values, None, None, 0.5)
    wanted = torch.softmax(query.double() @ keys.double().T / 2, -1) @ values.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_sizes_that_cannot_be_counted():
    one, wide = torch.randn(1, 1), torch.randn(1, 2**20)
    most = 2**40
    refused(
        f"softmax_read: dimension -2 of query must be at most {most}, got {2 * most}",
        *("softmax_read", one.expand(2 * most, 1), one, one, None, None, 1.0),
    )
    refused(
        f"softmax_read: the sizes of the arguments are too large, their product must be at most {2**61}",
        *("softmax_read", wide.expand(2**30, 2**20), wide.expand(2**30, 2**20), one.expand(2**30, 1), None, None, 1.0),
    )
    refused(
        f"softmax_read: the product of the leading dimensions must be at most {most}",
        *("softmax_read", one.expand(2**21, 1, 1, 1), one.expand(2**21, 1, 1), one, None, None, 1.0),
    )
    refused(
        f"softmax_read: out of memory, could not allocate {2**42} bytes",
        *("softmax_read", one.expand(most, 1), one, one, None, None, 1.0),
    )
