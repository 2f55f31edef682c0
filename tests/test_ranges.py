"""Ranges: each token addresses the slots first <= i < stop alone. Against the masked formula, written out."""

from __future__ import annotations

import math
import time

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

F64 = torch.float64
OPS = ("softmax_read", "topk_search", "topk_read", "slot_usage", "address", "sigmoid", "additive_read")
K, V, NEIGHBOURS = 6, 5, 4


def tensors(T: int, N: int, lead=(2,), dtype=F64) -> dict[str, torch.Tensor]:
    shapes = {"query": (T, K), "keys": (N, K), "values": (N, V), "vector": (K,), "lse": (T,)}
    return {name: randn(*lead, *shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def run(op: str, x: dict[str, torch.Tensor], backend: str, **options) -> tuple[torch.Tensor, ...]:
    """The float results of ``op``."""
    q, k, v, options = x["query"], x["keys"], x["values"], {**options, "backend": backend}
    if op == "softmax_read":
        return mk.softmax_read(q, k, v, return_lse=True, **options)
    if op == "topk_search":
        return (mk.topk_search(q, k, NEIGHBOURS, **options)[0],)
    if op == "topk_read":
        return mk.topk_read(q, k, v, NEIGHBOURS, return_slots=True, **options)[::2]
    if op == "slot_usage":
        return (mk.slot_usage(q, k, x["lse"], **options),)
    if op == "additive_read":
        return mk.additive_read(q, k, v, x["vector"], return_lse=True, **options)
    return (mk.address(q, k, gate="sigmoid" if op == "sigmoid" else "softmax", **options),)


def formula(op: str, x: dict[str, torch.Tensor], allowed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same where ``allowed [..., T, N]`` says which slots a token may address."""
    q, k, v = x["query"], x["keys"], x["values"]
    if op == "additive_read":
        s = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ x["vector"][..., None, :, None]
        s = s.squeeze(-1)
    else:
        s = q @ k.mT * K**-0.5
    s = s.masked_fill(~allowed, -math.inf)
    p = torch.softmax(s.masked_fill(~allowed.any(-1, keepdim=True), 0), -1) * allowed
    if op in ("softmax_read", "additive_read"):
        return p @ v, torch.logsumexp(s, -1)
    if op == "address":
        return (p,)
    if op == "sigmoid":
        return (torch.sigmoid(s),)
    if op == "slot_usage":
        return (torch.exp(s - x["lse"].unsqueeze(-1)).sum(-2),)
    padded = torch.nn.functional.pad(s, (0, NEIGHBOURS), value=-math.inf)
    best, which = padded.topk(NEIGHBOURS, -1)
    if op == "topk_search":
        return (best,)
    none = torch.isneginf(best)
    p = torch.softmax(best.masked_fill(none.all(-1, keepdim=True), 0), -1) * ~none
    rows = torch.nn.functional.pad(v, (0, 0, 0, NEIGHBOURS)).unsqueeze(-3).expand(*which.shape[:-1], -1, -1)
    return (p.unsqueeze(-1) * rows.gather(-2, which.unsqueeze(-1).expand(*which.shape, V))).sum(-2), p


def gradients(results, leaves, cotangents=None) -> list[torch.Tensor]:
    """Of the finite parts of ``results``, weighted by ``cotangents``."""
    total = torch.zeros((), dtype=F64)
    for i, r in enumerate(results):
        weight = randn(*r.shape, seed=9 + i).to(r.dtype) if cotangents is None else cotangents[i]
        total = total + (torch.where(torch.isneginf(r), 0, r) * weight).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]


def differentiable(op: str, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    used = {"additive_read": ("vector", "values"), "slot_usage": ("lse",)}.get(op, ())
    used = ("values",) if op in ("softmax_read", "topk_read") else used
    return {n: t.clone().requires_grad_(n in ("query", "keys", *used)) for n, t in x.items()}


def allowed(ranges: torch.Tensor, N: int) -> torch.Tensor:
    i = torch.arange(N)
    return (ranges[..., :1] <= i) & (i < ranges[..., 1:])


def random_ranges(*lead: int, N: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-N // 4, N + N // 4, (*lead, 2), generator=random)


KINDS = {
    "causal": lambda T, N: mk.causal_range(T, N, offset=N - T),
    "window": lambda T, N: mk.causal_range(T, window=9, offset=N - T),
    "random": lambda T, N: random_ranges(2, T, N=N, seed=T + N),
    "packed": lambda T, N: mk.packed_range([T // 3, 0, T - T // 3], [N // 2, 2, N - N // 2 - 2]),
}


@pytest.mark.parametrize(("T", "N"), [(3, 130), (90, 230)], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_it_is_the_masked_formula(backend, op, kind, T, N):
    x, ranges = tensors(T, N), KINDS[kind](T, N)
    ours, theirs = differentiable(op, x), differentiable(op, x)
    got, want = run(op, ours, backend, slot_range=ranges), formula(op, theirs, allowed(ranges, N))
    for g, w in zip(got, want):
        close(g, w, 1e-12)
    leaves = [n for n, t in ours.items() if t.requires_grad]
    got, want = gradients(got, [ours[n] for n in leaves]), gradients(want, [theirs[n] for n in leaves])
    for g, w in zip(got, want):
        close(g, w, 1e-11)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("slot_usage", "address", "sigmoid")])
def test_packed_documents_are_read_apart(backend, op):
    lengths, slots = [40, 1, 70, 0, 13], [90, 3, 70, 5, 2]
    x = tensors(sum(lengths), sum(slots))
    ranges = mk.packed_range(lengths, slots, causal=True, window=50)
    got = run(op, x, backend, slot_range=ranges)
    at = [(sum(lengths[:d]), sum(slots[:d])) for d in range(len(lengths))]
    for (t, i), n, m in zip(at, lengths, slots):
        own = {
            **x,
            "query": x["query"][:, t : t + n],
            "keys": x["keys"][:, i : i + m],
            "values": x["values"][:, i : i + m],
        }
        for g, w in zip(got, run(op, own, backend, slot_range=mk.causal_range(n, m, window=50))):
            close(g[:, t : t + n], w, 1e-12)


def poisoned(x: dict[str, torch.Tensor], slots, tokens, number: float) -> dict[str, torch.Tensor]:
    x = {n: t.detach().clone() for n, t in x.items()}
    for name in ("keys", "values"):
        x[name][:, slots] = number
    x["query"][:, tokens] = number
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize(("T", "N"), [(2, 130), (70, 160)], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("op", OPS)
def test_what_lies_outside_changes_no_bit(backend, op, T, N, dtype):
    """NaN and infinities in slots 40 .. 59, for the tokens that may not address them; and in the last token, for the
    slots that it may not address. In results and in gradients."""
    if backend == "reference" and dtype != F64:
        pytest.skip("plain PyTorch sums in an order of its own")
    x, odd = tensors(T, N, dtype=dtype), slice(40, 60)
    x["lse"] = x["lse"].to(torch.float32 if dtype != F64 else F64)
    ranges = random_ranges(T, N=N, seed=3)
    ranges[-1] = torch.tensor([50, 90])
    ranges[:-1:2, 0].clamp_(min=60)
    clear = ~allowed(ranges, N)[:, odd].any(-1)
    untouched = ~allowed(ranges[~clear], N).any(0)  # slots of no token that may address an odd one
    assert clear.sum() >= T // 2 and not clear[-1]

    def results(x: dict[str, torch.Tensor], number: float):
        leaves = differentiable(op, x)
        found = run(op, leaves, backend, slot_range=ranges)
        weights = [randn(*r.shape, seed=9 + i).to(r.dtype) for i, r in enumerate(found)]
        for w in weights if op != "slot_usage" else ():
            w[:, -1] *= number
        got = {n: t for n, t in leaves.items() if t.requires_grad}
        return found, dict(zip(got, gradients(found, list(got.values()), weights)))

    want, d_want = results(x, 1.0)
    for number in (math.nan, math.inf):
        got, d_got = results(poisoned(x, odd, T - 1, number), number)
        for g, w in zip(got, want):
            if op == "slot_usage":
                assert bits(g[:, untouched]) == bits(w[:, untouched])
            else:
                assert bits(g[:, clear]) == bits(w[:, clear])
        assert bits(d_got["query"][:, clear]) == bits(d_want["query"][:, clear])
        for name in ("keys", "values"):
            if name in d_got:
                assert bits(d_got[name][:, untouched]) == bits(d_want[name][:, untouched]), name


def test_sparse_gradients_keep_to_the_ranges(backend):
    x = {n: t[0] for n, t in tensors(20, 50).items()}
    leaves = [x[n].clone().requires_grad_() for n in ("query", "keys", "values")]
    ranges = random_ranges(20, N=50, seed=1)
    found = []
    for sparse in (False, True):
        read = mk.topk_read(*leaves, NEIGHBOURS, slot_range=ranges, sparse_grad=sparse, backend=backend)
        found.append([g.to_dense() for g in torch.autograd.grad(read.square().sum(), leaves)])
    for dense, sparse in zip(*found):
        close(sparse, dense, 1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("T", [1, 40])
def test_compressed_slots(backend, dtype, T):
    x = tensors(T, 230)
    keys, values = ((20 * x[n]).to(dtype) for n in ("keys", "values"))
    scales = torch.rand(2, 2, 230, dtype=F64, generator=torch.Generator().manual_seed(0))
    scales[..., 100:110] = math.nan
    ranges = mk.packed_range([T // 2, T - T // 2], [100, 100]) + torch.tensor([0, 10])
    ranges[: T // 2, 1] = 100
    ranges[T // 2 :, 0] = 110
    got = mk.softmax_read(
        x["query"], keys, values, slot_range=ranges, key_scale=scales[0], value_scale=scales[1], backend=backend
    )
    rows = [y.to(F64) * s.nan_to_num().unsqueeze(-1) for y, s in zip((keys, values), scales)]
    want = formula("softmax_read", {**x, "keys": rows[0], "values": rows[1]}, allowed(ranges, 230))[0]
    close(got, want, 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_int32_gives_the_bits_of_int64_and_layout_does_not_matter(backend, op):
    x, ranges = tensors(30, 130), random_ranges(2, 30, N=130, seed=5)
    want = [bits(r) for r in run(op, x, backend, slot_range=ranges)]
    wide = torch.full((2, 33, 5), 2**40)
    wide[:, 1:31, 1:5:2] = ranges
    beyond = torch.where(ranges <= 0, -(2**62), torch.where(ranges >= 130, 2**62, ranges))
    for own in (ranges.int(), wide[:, 1:31, 1:5:2], beyond, ranges.mT.contiguous().mT):
        assert [bits(r) for r in run(op, x, backend, slot_range=own)] == want


def test_wrong_ranges_are_refused(backend):
    x, ranges = tensors(3, 7, lead=()), mk.causal_range(3)
    for wrong, kind, sentence in (
        (ranges.double(), TypeError, "slot_range must be int64 or int32, got float64"),
        (ranges[:2], ValueError, r"slot_range must be \[..., T=3, 2\], got \[2, 2\]"),
        (ranges[:, :1], ValueError, r"slot_range must be \[..., T=3, 2\], got \[3, 1\]"),
        (ranges.expand(2, 3, 2), ValueError, r"leading dimensions of slot_range must broadcast to \[\], .* got \[2\]"),
        ([[0, 1]] * 3, TypeError, "slot_range must be a tensor, got list"),
    ):
        with pytest.raises(kind, match=f"^softmax_read: {sentence}"):
            run("softmax_read", x, backend, slot_range=wrong)


def test_compiled_and_transformed(backend):
    x, ranges = tensors(5, 40), mk.causal_range(5, offset=20)
    torch._dynamo.reset()
    read = torch.compile(lambda q: mk.softmax_read(q, x["keys"], x["values"], slot_range=ranges, backend=backend),
                         fullgraph=True, backend="aot_eager")  # fmt: skip
    close(read(x["query"]), run("softmax_read", x, backend, slot_range=ranges)[0], 1e-12)
    each = torch.vmap(lambda q, k, v: mk.softmax_read(q, k, v, slot_range=ranges, backend=backend))
    close(each(x["query"], x["keys"], x["values"]), read(x["query"]), 1e-12)


def test_second_derivatives(backend):
    x, ranges = tensors(2, 4), torch.tensor([[0, 3], [2, 4]])
    x = {n: t[0].clone().requires_grad_(n in ("query", "keys")) for n, t in x.items()}
    for op in OPS:
        used = ("query", "keys")

        def first(*leaves, op=op, used=used):
            return run(op, {**x, **dict(zip(used, leaves))}, backend, slot_range=ranges)[0].nan_to_num(neginf=0)

        assert torch.autograd.gradgradcheck(first, [x[n] for n in used], atol=1e-5)


@pytest.mark.parametrize("op", ["softmax_read", "topk_search"])
def test_the_work_is_that_of_the_ranges(op):
    """A window of 64 of 8192 slots: a tenth of the time or less, of one thread, so that half of it is far away."""
    x = tensors(2048, 8192, lead=(), dtype=torch.float32)
    times = {None: math.inf, 64: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            for window in times:
                ranges = None if window is None else mk.causal_range(2048, window=window, offset=4096)
                start = time.thread_time()
                run(op, x, "cpu", slot_range=ranges)
                times[window] = min(times[window], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert times[64] < times[None] / 2


def _causal(T: int, N: int | None, window: int | None, offset: int) -> list[list[int]]:
    slots = range(10**6 if N is None else N)
    found = []
    for t in range(T):
        own = [i for i in slots[: max(0, t + offset + 1)] if window is None or i > t + offset - window]
        found.append(own)
    return found


@pytest.mark.parametrize("N", [None, 0, 4, 9])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("offset", [-3, 0, 4])
def test_causal_range(N, window, offset):
    ranges = mk.causal_range(6, N, window=window, offset=offset)
    assert ranges.dtype == torch.int64 and ranges.shape == (6, 2) and (ranges >= 0).all()
    assert [list(range(*r)) for r in ranges.tolist()] == _causal(6, N, window, offset)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2)])
@pytest.mark.parametrize("slots", [None, [5, 1, 3, 0]])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_packed_range(causal, window, slots, kind):
    lengths = [3, 0, 4, 2]
    own = lengths if slots is None else slots
    ranges = mk.packed_range(kind(lengths), None if slots is None else kind(slots), causal=causal, window=window)
    want = []
    for d, n in enumerate(lengths):
        inner = _causal(n, own[d], window, 0) if causal else [list(range(own[d]))] * n
        want += [[sum(own[:d]) + i for i in slots_of_token] for slots_of_token in inner]
    assert ranges.dtype == torch.int64
    assert [list(range(*r)) for r in ranges.tolist()] == want


def test_what_makes_no_ranges_is_refused():
    for make, kind, sentence in (
        (lambda: mk.causal_range(-1), ValueError, "causal_range: T must be at least 0, got -1"),
        (lambda: mk.causal_range(2.0), TypeError, "causal_range: T must be an int, got float"),
        (lambda: mk.causal_range(2, window=0), ValueError, "causal_range: window must be at least 1, got 0"),
        (lambda: mk.packed_range([1, -2]), ValueError, "packed_range: lengths must be at least 0, got -2"),
        (
            lambda: mk.packed_range([1], [1, 2]),
            ValueError,
            "packed_range: slot_lengths must be one per document, 1, got 2",
        ),
        (lambda: mk.packed_range([1], window=2), ValueError, "packed_range: window must be None without causal, got 2"),
        (
            lambda: mk.packed_range(torch.rand(2)),
            TypeError,
            r"packed_range: lengths must be integers \[documents\], got",
        ),
        (lambda: mk.packed_range([1], causal=1), TypeError, "packed_range: causal must be a bool, got int"),
    ):
        with pytest.raises(kind, match=f"^{sentence}"):
            make()


@pytest.mark.parametrize("op", OPS)
def test_the_bits_do_not_depend_on_threads(op):
    x, ranges = tensors(150, 700, dtype=torch.float32), random_ranges(150, N=700, seed=4)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            leaves = differentiable(op, x)
            results = run(op, leaves, "cpu", slot_range=ranges)
            d = gradients(results, [t for t in leaves.values() if t.requires_grad])
            found.append([bits(r) for r in (*results, *d)])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
