"""Plain PyTorch, vectorised: the form an author writes who knows PyTorch well. Forms [T, N]."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAME = "eager"
DIRECTIONS = ("forward", "backward")
QUICK = True


def softmax_read(query, keys, values):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.softmax(scale * query @ keys.mT, -1) @ values


def softmax_read_compressed(query, keys, values, key_scale, value_scale):
    scale = query.shape[-1] ** -0.5

    def run():
        weights = torch.softmax(scale * query @ keys.to(query.dtype).mT * key_scale.unsqueeze(-2), -1)
        return (weights * value_scale.unsqueeze(-2)) @ values.to(query.dtype)

    return run


def slot_usage(query, keys, lse):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.exp(scale * query @ keys.mT - lse.unsqueeze(-1)).sum(-2)


def exact(scores):
    """In float32 at least: sums of thousands of logarithms mean nothing in 16 bits."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def written(values, keys, query, write):
    gate = torch.sigmoid(exact(keys @ (query.shape[-1] ** -0.5 * query).mT))  # [..., N, T]
    return interpolated(values, gate, write)


def interpolated(values, gate, write):
    """Suffix products in log space: what token t writes is kept by the tokens after it. gate: [..., N, T].

    Tokens run along the last axis, where a cumulative sum is contiguous and fastest.
    """
    log_kept = torch.cumsum(torch.log1p(-gate), -1)
    total = log_kept[..., -1:]
    added = (gate * torch.exp(total - log_kept)).to(write.dtype) @ write
    return (torch.exp(total) * values + added).to(values.dtype)


def softmax_write(values, keys, query, write):
    scale = query.shape[-1] ** -0.5
    return lambda: interpolated(values, torch.softmax(keys @ (scale * query).mT, 0), write)


def gated_write(values, keys, query, write):
    return lambda: written(values, keys, query, write)


def topk_search(query, keys, k):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.topk(scale * query @ keys.mT, k)[0]


def paged_topk_search(query, keys, pages, k):
    scale, size = query.shape[-1] ** -0.5, keys.shape[-2]

    def run():
        scores, at = torch.topk(scale * query @ keys.flatten(-3, -2).mT, k)
        return scores, pages[at // size] * size + at % size

    return lambda: run()[0]


def topk_read(query, keys, values, k):
    scale = query.shape[-1] ** -0.5

    def run():
        scores, indices = torch.topk(product(scale * query, keys.mT), k)
        return weighted_rows(values, indices, torch.softmax(scores, -1).to(values.dtype))

    return run


def product(a, b):
    """[T, K] @ [K, N]; of bfloat16 on a GPU in float32, for scores rounded to 8 bits choose other slots."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype == torch.bfloat16 else a @ b


def sparse_read(values, indices, weights):
    return lambda: weighted_rows(values, indices, weights)


def weighted_rows(values, indices, weights):
    return (weights.unsqueeze(-2) @ values[indices]).squeeze(-2)


def selected_scores(query, keys, indices):
    scale = query.shape[-1] ** -0.5
    return lambda: (keys[indices] @ (scale * query).unsqueeze(-1)).squeeze(-1)


def selected_read(query, keys, values, indices):
    scale = query.shape[-1] ** -0.5

    def run():
        scores = (keys[indices] @ (scale * query).unsqueeze(-1)).squeeze(-1)
        return weighted_rows(values, indices, torch.softmax(scores, -1))

    return run


def indexer_search(query, head_weights, keys, k):
    """The products of all heads, [T, H, N], in memory."""
    scale = query.shape[-1] ** -0.5

    def run():
        products = torch.relu(scale * query @ keys.mT)
        return torch.topk((head_weights.unsqueeze(-2) @ products).squeeze(-2), k)[0]

    return run


def gated_scan(forget, update):
    """In log2(T) steps, each of which joins every part with the one before it."""

    def run():
        f, h, step = forget, update, 1
        while step < h.shape[1]:
            h = torch.cat([h[:, :step], h[:, step:] + f[:, step:] * h[:, :-step]], 1)
            f = torch.cat([f[:, :step], f[:, step:] * f[:, :-step]], 1)
            step *= 2
        return h

    return run


CHUNK = 16  # tokens: the [CHUNK, CHUNK, N] products of a longer one cost more than its matrix products save


def memory_scan(values, keys, read_query, write_query, write):
    """Chunks of tokens: what was there before, and a causal [CHUNK, CHUNK] attention to what the chunk writes."""
    scale = keys.shape[-1] ** -0.5

    def run():
        gates = torch.sigmoid(exact(scale * write_query @ keys.mT)).split(CHUNK, -2)
        weights = torch.softmax(exact(scale * read_query @ keys.mT), -1).split(CHUNK, -2)
        memory, reads = exact(values), []
        for a, p, w in zip(gates, weights, exact(write).split(CHUNK, -2)):
            kept = torch.cumsum(torch.log1p(-a), -2)
            since = torch.exp((kept.unsqueeze(-2) - kept.unsqueeze(-3)).clamp(max=0))  # [..., t, s, N]
            within = torch.einsum("...ti,...tsi,...si->...ts", p, since, a).tril()
            reads.append((p * torch.exp(kept)) @ memory + within @ w)
            last = kept[..., -1:, :]
            memory = torch.exp(last).mT * memory + (a * torch.exp(last - kept)).mT @ w
        return torch.cat(reads, -2).to(write.dtype)

    return run


def best_halves(query, subkeys, k):
    """The k best of each list: scores and rows, both [2, T, k]."""
    scale = query.shape[-1] ** -0.5
    halves = torch.einsum("tch,cnh->ctn", query.unflatten(-1, (2, -1)), scale * subkeys)
    return torch.topk(halves, min(k, subkeys.shape[-2]))


def best_pairs(query, subkeys, k):
    """The k best of each list, their sums, and the k best of those."""
    first, second = best_halves(query, subkeys, k)[0]
    return torch.topk((first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2), k)[0]


def pair_read(query, subkeys, values, k):
    """The same, then the slots of those pairs, a softmax and a gather."""
    (first, second), (i, j) = best_halves(query, subkeys, k)
    scores, pair = torch.topk((first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2), k)
    width = second.shape[-1]
    slots = i.gather(-1, pair // width) * subkeys.shape[-2] + j.gather(-1, pair % width)
    return weighted_rows(values, slots, torch.softmax(scores, -1))


def product_key_read(query, subkeys, values, k):
    return lambda: pair_read(query, subkeys, values, k)


def product_key_search(query, subkeys, k):
    return lambda: best_pairs(query, subkeys, k)


def additive_attention(query, keys, values, score_vector):
    hidden = torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3))
    return torch.softmax(hidden @ score_vector, -1) @ values


def additive_read(query, keys, values, score_vector):
    return lambda: additive_attention(query, keys, values, score_vector)


def mixed_loss(logits, targets, cache_scores, cache_tokens, mix):
    targets = targets.unsqueeze(-1)
    own = torch.log_softmax(logits, -1).gather(-1, targets).squeeze(-1).exp()
    cached = (torch.softmax(cache_scores, -1) * (cache_tokens == targets)).sum(-1)
    return -torch.log((1 - mix) * own + mix * cached)


def mixed_loss_and_stats(logits, targets, cache_scores, cache_tokens, mix):
    log_own = torch.log_softmax(logits, -1)
    own = log_own.exp()
    stats = torch.logsumexp(logits, -1), own.amax(-1), -(own * log_own).sum(-1)
    return mixed_loss(logits, targets, cache_scores, cache_tokens, mix), *stats


def cache_nll(logits, targets, cache_scores, cache_tokens, mix, return_stats=False):
    run = mixed_loss_and_stats if return_stats else mixed_loss
    return lambda: run(logits, targets, cache_scores, cache_tokens, mix)


def mixed(logits, cache_scores, cache_tokens, mix):
    cached = torch.zeros_like(logits).scatter_add(-1, cache_tokens, torch.softmax(cache_scores, -1))
    mix = mix.unsqueeze(-1)
    return torch.log((1 - mix) * torch.softmax(logits, -1) + mix * cached)


def cache_logprobs(logits, cache_scores, cache_tokens, mix):
    return lambda: mixed(logits, cache_scores, cache_tokens, mix)


def ngram_slots(tokens, sizes, multipliers, token_map, orders, heads):
    """Without ignored tokens, from the beginning of a text on, with 0 before it."""
    before, factors = max(orders) - 1, multipliers.tolist()
    by_table = torch.tensor([n - 1 for n in orders for _ in range(heads)], device=tokens.device)
    offsets = sizes.cumsum(0) - sizes

    def run():
        x = F.pad(token_map[tokens], (before, 0))
        mixes = [x[..., before:] * factors[0]]
        for j in range(1, before + 1):
            mixes.append(mixes[-1] ^ (x[..., before - j : -j] * factors[j]))
        return torch.remainder(torch.stack(mixes, -1)[..., by_table], sizes).add_(offsets)

    return run


def embedded(values, indices, value_scale, dtype):
    """Of rows in 8 bits, which F.embedding takes as bytes."""
    rows = F.embedding(indices, values.view(torch.uint8)).view(values.dtype)
    return (rows.float() * value_scale[indices].unsqueeze(-1)).to(dtype)


def gather_rows(values, indices, value_scale=None, dtype=None):
    if value_scale is None:
        return lambda: F.embedding(indices, values)
    return lambda: embedded(values, indices, value_scale, dtype)


def gated(hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt):
    width = hidden.shape[-1:]
    query = F.rms_norm(hidden, width, eps=eps) * hidden_weight
    score = (query * (F.rms_norm(key, width, eps=eps) * key_weight)).sum(-1) * width[0] ** -0.5
    if signed_sqrt:
        score = score.sign() * score.abs().clamp(min=1e-6).sqrt()
    return torch.sigmoid(score).unsqueeze(-1) * value.unsqueeze(-2)


def memory_gate(hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt):
    return lambda: gated(hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt)
