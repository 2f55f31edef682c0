"""Writes and scans in plain PyTorch. Gates stand as [..., N, T]: one cumulative sum runs along contiguous tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...peers import eager
from .form import Form, exact, scored

MOST_DENSE = 1 << 22  # numbers of a dense [N, T] matrix of gates that a few chosen slots are scattered to
MOST_STEPS = 1024  # tokens of a loop: beyond that nobody waits for it


def folded(memory: Tensor, tail: int, *tokens: Tensor | None) -> list[Tensor | None]:
    """Tokens of all streams, where they write into one memory [N, V]. tail: axes that belong to the tokens."""
    if memory.dim() > 2:
        return list(tokens)
    return [None if x is None else x.reshape(-1, *x.shape[x.dim() - tail + 1 :]) for x in tokens]


def gates(gate, values, keys, query, slot_mask, token_mask):
    """[..., N, T] in float32 at least."""
    scores = exact(scored(query, keys, slot_mask)).mT
    a = torch.sigmoid(scores) if gate == "sigmoid" else torch.softmax(scores, -2)
    return a if token_mask is None else a.masked_fill(~token_mask.unsqueeze(-2), 0)


def one_token(values, a, write, erase):
    a = a.to(values.dtype)
    if isinstance(erase, Tensor):
        return torch.addcmul(values, a, write - erase * values)
    return torch.lerp(values, write, a) if erase == 1 else torch.addcmul(values, a, write)


def at_once(values, a, write, erase):
    """Suffix products, or for what is only added one product."""
    if erase == 1:
        return eager.interpolated(values, a, write)
    return values + a.to(write.dtype) @ write


def token_by_token(values, a, write, erase):
    for t in range(write.shape[-2]):
        e = erase[..., t : t + 1, :] if isinstance(erase, Tensor) else erase
        values = one_token(values, a[..., t : t + 1], write[..., t : t + 1, :], e)
    return values


def one_token_in_place(values, a, write, erase):
    a = a.to(values.dtype)
    if isinstance(erase, Tensor):
        return values.addcmul_(a, write - erase * values)
    return values.lerp_(write, a) if erase == 1 else values.addcmul_(a, write)


def at_once_in_place(values, a, write, erase):
    return values.copy_(at_once(values, a, write, erase))


def in_turn_in_place(values, a, write, erase):
    for t in range(write.shape[-2]):
        e = erase[..., t : t + 1, :] if isinstance(erase, Tensor) else erase
        one_token_in_place(values, a[..., t : t + 1], write[..., t : t + 1, :], e)
    return values


def _scored_write(gate, apply):
    def write_scores(values, keys, query, write, erase=1.0, slot_mask=None, token_mask=None):
        e = erase if isinstance(erase, Tensor) else None
        query, write, e = folded(values, 2, query, write, e)
        (token_mask,) = folded(values, 1, token_mask)
        return apply(values, gates(gate, values, keys, query, slot_mask, token_mask), write, erase if e is None else e)

    return write_scores


def _weighted_write(apply):
    def write_weights(values, weights, write, erase=1.0, token_mask=None):
        e = erase if isinstance(erase, Tensor) else None
        weights, write, e = folded(values, 2, weights, write, e)
        (token_mask,) = folded(values, 1, token_mask)
        a = exact(weights).mT
        a = a if token_mask is None else a.masked_fill(~token_mask.unsqueeze(-2), 0)
        return apply(values, a, write, erase if e is None else e)

    return write_weights


def tokens(values, write, **rest) -> int:
    """T, as the memory sees it."""
    return write.shape[:-1].numel() if values.dim() == 2 else write.shape[-2]


def single(**arguments) -> bool:
    return tokens(**arguments) == 1


def several(erase=1.0, **arguments) -> bool:
    """What erases by a vector has no closed form whose matrices are [N, T]."""
    return tokens(**arguments) > 1 and not isinstance(erase, Tensor)


def few(**arguments) -> bool:
    return 1 < tokens(**arguments) <= MOST_STEPS


def _ways(write) -> tuple[Form, ...]:
    return (
        Form("eager, one token", write(one_token), single),
        Form("eager", write(at_once), several),
        Form("loop", write(token_by_token), few),
        Form("eager, in place", write(one_token_in_place), single, in_place=True),
        Form("eager, copied back", write(at_once_in_place), several, in_place=True),
        Form("loop, in place", write(in_turn_in_place), few, in_place=True),
    )


def sparse_loop(values, indices, weights, write):
    """Into a copy; where a gradient is wanted every token makes one."""
    return sparse_loop_in_place(values.clone(), indices, weights, write)


def sparse_loop_in_place(values, indices, weights, write):
    """Streams with a memory each count their slots on."""
    memory = values.view(-1, values.shape[-1])
    if values.dim() > 2:
        n = values.shape[-2]
        indices = indices + torch.arange(0, len(memory), n).view(*values.shape[:-2], 1, 1)
    else:
        indices, weights, write = folded(values, 2, indices, weights, write)
    put = torch.Tensor.index_put if torch.is_grad_enabled() else torch.Tensor.index_put_
    for t in range(write.shape[-2]):
        at = indices[..., t, :]
        new = torch.lerp(memory[at], write[..., t : t + 1, :], weights[..., t, :].unsqueeze(-1))
        memory = put(memory, (at,), new)
    return memory.view(values.shape)


def sparse_dense(values, indices, weights, write):
    """As a dense write."""
    indices, weights, write = folded(values, 2, indices, weights, write)
    gates = weights.new_zeros(*indices.shape[:-1], values.shape[-2]).scatter(-1, indices, weights)
    return at_once(values, exact(gates).mT, write, 1.0)


def dense_fits(**arguments) -> bool:
    return tokens(arguments["values"], arguments["write"]) * arguments["values"].shape[-2] <= MOST_DENSE


def states_in_log_steps(forget, update):
    return eager.gated_scan(forget, update)()


def states_in_turn(forget, update, initial=None):
    h, states = torch.zeros_like(update[..., 0, :]) if initial is None else initial, []
    for f, u in zip(forget.unbind(-2), update.unbind(-2)):
        h = torch.addcmul(u, f, h)
        states.append(h)
    return torch.stack(states, -2)


def next_state(forget, update, initial):
    return torch.addcmul(update, forget, initial.unsqueeze(-2))


def cells(inputs, weight, initial=None):
    width = weight.shape[-1]
    h, states = inputs.new_zeros(*inputs.shape[:-2], width) if initial is None else initial, []
    columns = weight.mT
    for x in inputs.unbind(-2):
        z = torch.addmm(x, h, columns) if h.dim() == 2 else x + h @ columns
        gates = torch.sigmoid(z[..., : 2 * width])
        h = gates[..., :width] * h + gates[..., width:] * torch.tanh(z[..., 2 * width :])
        states.append(h)
    return torch.stack(states, -2)


def memory_in_chunks(values, keys, read_query, write_query, write):
    return eager.memory_scan(values, keys, read_query, write_query, write)()


def memory_in_turn(values, keys, read_query, write_query, write, slot_mask=None):
    a = torch.sigmoid(scored(write_query, keys, slot_mask)).unsqueeze(-1)  # [..., T, N, 1]
    p = torch.softmax(scored(read_query, keys, slot_mask), -1)
    reads = []
    for t in range(write.shape[-2]):
        values = torch.lerp(values, write[..., t : t + 1, :], a[..., t, :, :])
        reads.append(p[..., t : t + 1, :] @ values)
    return torch.cat(reads, -2)


FORMS = {
    "gated_write": _ways(lambda apply: _scored_write("sigmoid", apply)),
    "softmax_write": _ways(lambda apply: _scored_write("softmax", apply)),
    "slot_write": _ways(_weighted_write),
    "sparse_write": (
        Form("loop", sparse_loop, lambda **given: tokens(given["values"], given["write"]) <= MOST_STEPS),
        Form("eager, dense", sparse_dense, dense_fits),
        Form("loop, in place", sparse_loop_in_place, in_place=True),
    ),
    "gated_scan": (
        Form("eager", states_in_log_steps, lambda initial=None, **rest: initial is None),
        Form("loop", states_in_turn, lambda update, **rest: 1 < update.shape[-2] <= MOST_STEPS),
        Form("eager, one token", next_state, lambda update, initial=None, **rest: update.shape[-2] == 1),
    ),
    "cell_scan": (Form("loop", cells),),
    "memory_scan": (
        Form(
            "eager", memory_in_chunks, lambda write, slot_mask=None, **rest: write.shape[-2] > 1 and slot_mask is None
        ),
        Form("loop", memory_in_turn, lambda write, **rest: write.shape[-2] <= MOST_STEPS),
    ),
}
