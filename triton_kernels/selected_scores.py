"""selected_scores on a GPU: s[t, j] = scale <q_t, k_{i_j}> of the slots i_j = indices[t, j], -inf where there is none.

A program takes a few tokens and a block of the slots that they name: all rows of the block are in flight at once, bound
by the bandwidth of the gather. Backward: a gather for the query, sums over sorted entries for the keys (segments.py).

An index outside [-1, N) fails an assertion on the device, without a synchronisation, and is never followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, SCALE, Example, Inputs, operator
from .launch import launch, plan, width
from .layout import Call
from .segments import gathered_dots
from .sparse_read import check_indices
from .tiles import tokens
from .topk_search import choice_gradients


@triton.jit
def selected_scores_kernel(
    q, keys, indices, scales, out, T, N, K, k, B1, inner, scale,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_J)
    j = (pid % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    pid = pid // blocks
    t = (pid % tl.cdiv(T, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // tl.cdiv(T, BLOCK_T)
    t_ok = t < T
    inside = t_ok[:, None] & (j < k)[None, :]
    slot = tl.load(tokens(indices, b, B1, t, inner)[:, None] + j[None, :], mask=inside, other=-1)
    ok = (slot >= 0) & (slot < N)
    s = gathered_dots(q, keys, scales, b, B1, t, inner, t_ok, slot, ok, K, BLOCK_K, K_STEPS) * scale
    s = tl.where(ok, s, float("-inf")).to(out[0].dtype.element_ty)
    tl.store(tokens(out, b, B1, t, inner)[:, None] + j[None, :], s, mask=inside)


def _call(op: str, query: Tensor, keys: Tensor, indices: Tensor, *more: tuple, key_scale: Tensor | None = None) -> Call:
    (T, K), N, k = query.shape[-2:], keys.shape[-2], indices.shape[-1]
    token_side = [("query", query, (T, K)), ("indices", indices, (T, k)), *more]
    call = Call(op, token_side, [("keys", keys, (N, K)), ("key_scale", key_scale, (N,))])
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    check_indices(call, indices, N)
    return call


@operator
def selected_scores(query: Tensor, keys: Tensor, indices: Tensor, scale: float) -> Tensor:
    """scores ``[..., T, k]`` in the dtype of query."""
    return _scores(_call("selected_scores", query, keys, indices), query, keys, indices, None, scale)


@operator
def selected_scores_compressed(
    query: Tensor, keys: Tensor, indices: Tensor, key_scale: Tensor | None, scale: float
) -> Tensor:
    """The same over keys in 8 bits."""
    call = _call("selected_scores_compressed", query, keys, indices, key_scale=key_scale)
    return _scores(call, query, keys, indices, key_scale, scale)


def _scores(call: Call, query: Tensor, keys: Tensor, indices: Tensor, key_scale: Tensor | None, scale: float) -> Tensor:
    (T, K), N, k, count = query.shape[-2:], keys.shape[-2], indices.shape[-1], call.F * query.shape[-2]
    scores, view = call.token_result(T, k, dtype=query.dtype)
    p, wide = plan("chosen_dots", K, query, keys), width(K, query, keys)
    block_t, block_j = p.config.block_t, min(p.config.block_n, triton.next_power_of_2(k))
    launch(
        selected_scores_kernel, call.B * triton.cdiv(count, block_t) * triton.cdiv(k, block_j),
        call.rows(query), call.slots(keys), call.rows(indices), call.slot_numbers(key_scale),
        (view, *view.stride()[:4]), count, N, K, k, call.batches[1], T if call.F > 1 else None, scale,
        plan=p, BLOCK_T=block_t, BLOCK_J=block_j, BLOCK_K=wide.block, K_STEPS=wide.steps,
    )  # fmt: skip
    return call.store(scores, view)


@operator
def selected_scores_backward(
    query: Tensor, keys: Tensor, indices: Tensor, d_scores: Tensor | None, scale: float, wants: list[bool]
):  # fmt: skip
    """Gradients of query and keys."""
    call = _call("selected_scores_backward", query, keys, indices, _gradient(indices, d_scores))
    call.require(len(wants) == 2, "wants must have 2 entries")
    return _gradients(call, query, keys, indices, None, d_scores, scale, wants)


@operator
def selected_scores_compressed_backward(
    query: Tensor, keys: Tensor, indices: Tensor, key_scale: Tensor | None, d_scores: Tensor | None, scale: float,
    wants: list[bool],
) -> Tensor:  # fmt: skip
    """The gradient of query."""
    more = _gradient(indices, d_scores)
    call = _call("selected_scores_compressed_backward", query, keys, indices, more, key_scale=key_scale)
    call.require(len(wants) == 1, "wants must have 1 entry")
    return _gradients(call, query, keys, indices, key_scale, d_scores, scale, [wants[0], False])[0]


def _gradient(indices: Tensor, d_scores: Tensor | None) -> tuple:
    return ("d_scores", d_scores, tuple(indices.shape[-2:]))


def _gradients(
    call: Call, query: Tensor, keys: Tensor, indices: Tensor, key_scale: Tensor | None, d_scores: Tensor | None,
    scale: float, wants: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call.require(d_scores is not None, "d_scores must be given")
    call.floats(d_scores)
    ds = call.token_view(d_scores, 1).reshape(call.B, call.F * query.shape[-2], indices.shape[-1])
    wants = [*wants, False]
    return choice_gradients(
        call, query, keys, None, indices, ds.float().contiguous(), scale, wants, key_scale=key_scale
    )[:2]


def examples(x: Inputs) -> Iterator[Example]:
    q, i = x(2, x.tokens, x.width), x.integers(2, x.tokens, 32, below=x.slots)
    yield Example(selected_scores, (q, x(2, x.slots, x.width), i, SCALE))
    for kind, dtype in COMPRESSED.items():
        arguments = (q, x.compressed(2, x.slots, x.width, dtype=dtype), i, x(2, x.slots, dtype=torch.float32), SCALE)
        yield Example(selected_scores_compressed, arguments, variant=kind)
