"""Reads and searches over compressed slots against the equation in float64, and the calls that are refused."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, N, K, V = 2, 5, 40, 16, 24
QUERY = randn(B, T, K).float()
KEYS, VALUES = randn(B, N, K, seed=1), randn(B, N, V, seed=2)
KEY_SCALE, VALUE_SCALE = KEYS.abs().amax(-1) / 127, VALUES.abs().amax(-1) / 127
COMPRESSED = {
    torch.int8: lambda x, scale: (x / scale.unsqueeze(-1)).round().to(torch.int8),
    torch.float8_e4m3fn: lambda x, scale: (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn),
}


@pytest.fixture(params=COMPRESSED, ids=lambda dtype: str(dtype).removeprefix("torch."))
def slots(request):
    """Compressed keys and values, and the rows they stand for in float64."""
    compress = COMPRESSED[request.param]
    keys, values = compress(KEYS, KEY_SCALE), compress(VALUES, VALUE_SCALE)
    rows = [x.double() * s.float().double().unsqueeze(-1) for x, s in ((keys, KEY_SCALE), (values, VALUE_SCALE))]
    return keys, values, *rows


SCALES = {"key_scale": KEY_SCALE.float(), "value_scale": VALUE_SCALE.float()}


def test_softmax_read(backend, slots):
    keys, values, k, v = slots
    weights = torch.softmax(K**-0.5 * QUERY.double() @ k.mT, -1)
    close(mk.softmax_read(QUERY, keys, values, **SCALES, backend=backend).double(), weights @ v, 2e-6)


def test_few_and_many_tokens_agree(backend, slots):
    """One token at a time takes other kernels than all at once."""
    keys, values, *_ = slots
    query = randn(90, K).float()
    whole = mk.softmax_read(query, keys[0], values[0], **{n: s[0] for n, s in SCALES.items()}, backend=backend)
    for t in (0, 7, 89):
        one = mk.softmax_read(
            query[t : t + 1], keys[0], values[0], **{n: s[0] for n, s in SCALES.items()}, backend=backend
        )
        close(one.double(), whole[t : t + 1].double(), 2e-6)


def test_searches(backend, slots):
    keys, values, k, v = slots
    s = K**-0.5 * QUERY.double() @ k.mT
    best, which = torch.topk(s, 6)
    scores, indices = mk.topk_search(QUERY, keys, 6, key_scale=SCALES["key_scale"], backend=backend)
    assert torch.equal(indices, which)
    close(scores.double(), best, 2e-6)
    read, indices, weights = mk.topk_read(QUERY, keys, values, 6, **SCALES, return_slots=True, backend=backend)
    wanted = torch.softmax(best, -1)
    assert torch.equal(indices, which)
    close(weights.double(), wanted, 2e-6)
    rows = torch.stack([v[b][which[b]] for b in range(B)])
    close(read.double(), torch.einsum("btk,btkv->btv", wanted, rows), 2e-6)


def test_sparse_read(backend, slots):
    _, values, _, v = slots
    indices, weights = torch.tensor([[3, -1, 3], [0, 39, 7]]), randn(B, 2, 3).float()
    rows = v[:, indices.clamp(min=0)] * (indices >= 0).unsqueeze(-1)
    wanted = torch.einsum("btk,btkv->btv", weights.double(), rows)
    got = mk.sparse_read(values, indices, weights, value_scale=SCALES["value_scale"], backend=backend)
    close(got.double(), wanted, 2e-6)


def test_every_float8_number(backend):
    """All 256 of them, denormals and both zeros, through a kernel that flushes denormal float32 numbers."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()].unsqueeze(-1)
    n = every.shape[0]
    query = torch.zeros(n, 1)  # the mask alone chooses the slot
    mask = torch.zeros(n, n).fill_(-torch.inf).fill_diagonal_(0)
    got = mk.softmax_read(
        query.unsqueeze(1),
        every,
        every,
        slot_mask=mask,
        key_scale=torch.ones(n),
        value_scale=torch.ones(n),
        backend=backend,
    )
    assert torch.equal(got.reshape(-1), every.float().reshape(-1))


def test_gradients_are_those_of_the_rows(backend, slots):
    keys, values, k, v = slots
    query, exact = QUERY.clone().requires_grad_(), QUERY.double().requires_grad_()
    mk.softmax_read(query, keys, values, **SCALES, backend=backend).square().sum().backward()
    (torch.softmax(K**-0.5 * exact @ k.mT, -1) @ v).square().sum().backward()
    close(query.grad.double(), exact.grad, 5e-6)


def test_what_does_not_fit_is_refused(backend, slots):
    keys, values, *_ = slots
    floats = KEYS.float()
    with pytest.raises(TypeError, match="^softmax_read: key_scale must be a tensor, got None beside keys in "):
        mk.softmax_read(QUERY, keys, VALUES.float(), backend=backend)
    with pytest.raises(TypeError, match="^topk_search: key_scale is for int8 and float8_e4m3fn, got one beside keys "):
        mk.topk_search(QUERY, floats, 3, key_scale=SCALES["key_scale"], backend=backend)
    sentence = "^softmax_read: keys must not require a gradient beside compressed slots, got one$"
    with pytest.raises(RuntimeError, match=sentence):
        mk.softmax_read(QUERY, floats.requires_grad_(), values, value_scale=SCALES["value_scale"], backend=backend)
    with pytest.raises(ValueError, match="value_scale must be"):
        mk.sparse_read(values, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), value_scale=torch.ones(3))
