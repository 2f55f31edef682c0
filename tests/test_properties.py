"""Random shapes, leading dimensions, strides and masks: every backend against the reference in float64."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import close

import memkernels as mk
from memkernels.spec import several

# The fixture is only a name of a backend, so all examples may share it.
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZES = st.integers(0, 40) | st.sampled_from([63, 64, 65, 127, 129, 200])
WIDTHS = st.integers(1, 40) | st.sampled_from([63, 64, 65, 128, 257])


@st.composite
def shapes(draw, rank: int = 3):
    """A leading shape for the tokens and one for the memory that broadcast together."""
    whole = draw(st.lists(st.integers(1, 3), max_size=rank))

    def part():
        kept = [n if draw(st.booleans()) else 1 for n in whole]
        return tuple(kept[draw(st.integers(0, len(kept))) :]) if kept else ()

    return part(), part()


@st.composite
def tensor(draw, *shape: int):
    """Normal numbers in a layout drawn at random: rows padded, dimensions swapped, the last one strided."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    layout = draw(st.sampled_from(["plain", "plain", "transposed", "strided", "padded"]))
    if layout == "transposed" and x.dim() >= 2:
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.repeat_interleave(x, 2, -1)[..., ::2]
    if layout == "padded":
        return torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2]
    return x


@st.composite
def masks(draw, *shape: int):
    kind = draw(st.sampled_from(["none", "bool", "float", "empty"]))
    if kind == "none":
        return None
    x = draw(tensor(*shape))
    if kind == "bool":
        return x > 0
    return x if kind == "float" else x.masked_fill(x < 0, -torch.inf)


@st.composite
def memories(draw):
    tokens, memory = draw(shapes())
    t, n, k, v = draw(SIZES), draw(SIZES), draw(WIDTHS), draw(WIDTHS)
    return {
        "query": draw(tensor(*tokens, t, k)),
        "write": draw(tensor(*tokens, t, v)),
        "keys": draw(tensor(*memory, n, k)),
        "values": draw(tensor(*memory, n, v)),
        "slot_mask": draw(masks(*memory, n)),
        "scale": draw(st.sampled_from([None, 1.0, -0.5, 0.1])),
    }


def _gradients(run, tensors, which):
    leaves = [tensors[name].detach().clone().requires_grad_() for name in which]
    outputs = run({**tensors, **dict(zip(which, leaves))})
    outputs = [o for o in several(outputs) if o.requires_grad]
    if not outputs:
        return []
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=random, dtype=o.dtype) for o in outputs]
    outputs = [torch.where(torch.isfinite(o), o, 0) for o in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)


def agrees(run, tensors, which, backend):
    """``run(tensors, backend)`` gives the results and gradients of the reference."""
    which = [name for name in which if tensors[name] is not None and tensors[name].is_floating_point()]
    got, wanted = (run(tensors, b) for b in (backend, "reference"))
    for g, w in zip(several(got), several(wanted)):
        if g.is_floating_point():
            close(g, w)
        else:
            assert torch.equal(g, w)  # random float64 scores have no ties
    for g, w in zip(*(_gradients(lambda x, b=b: run(x, b), tensors, which) for b in (backend, "reference"))):
        close(g, w)


@given(memories())
@anew
def test_softmax_read(native, m):
    def run(x, b):
        return mk.softmax_read(
            x["query"], x["keys"], x["values"], scale=x["scale"], slot_mask=x["slot_mask"], return_lse=True, backend=b
        )

    agrees(run, m, ["query", "keys", "values", "slot_mask"], native)


@given(memories(), st.sampled_from(mk.ops.address.__globals__["GATES"]))
@anew
def test_address(native, m, gate):
    def run(x, b):
        return mk.address(x["query"], x["keys"], scale=x["scale"], slot_mask=x["slot_mask"], gate=gate, backend=b)

    agrees(run, m, ["query", "keys", "slot_mask"], native)


@given(memories())
@anew
def test_slot_usage(native, m):
    def lse(x):
        return mk.softmax_read(**pick(x), slot_mask=x["slot_mask"], return_lse=True, backend="reference")[1]

    def pick(x):
        return {name: x[name] for name in ("query", "keys", "values", "scale")}

    m = {**m, "lse": lse(m)}

    def run(x, b):
        return mk.slot_usage(x["query"], x["keys"], x["lse"], scale=x["scale"], slot_mask=x["slot_mask"], backend=b)

    agrees(run, m, ["query", "keys", "lse", "slot_mask"], native)


@given(memories(), st.integers(1, 12) | st.sampled_from([33, 100, 300]))
@anew
def test_topk(native, m, k):
    def search(x, b):
        return mk.topk_search(x["query"], x["keys"], k, scale=x["scale"], slot_mask=x["slot_mask"], backend=b)

    def read(x, b):
        options = {"scale": x["scale"], "slot_mask": x["slot_mask"], "return_slots": True, "backend": b}
        return mk.topk_read(x["query"], x["keys"], x["values"], k, **options)

    agrees(search, m, ["query", "keys", "slot_mask"], native)
    agrees(read, m, ["query", "keys", "values", "slot_mask"], native)


@given(memories(), st.sampled_from([1.0, 0.0, 0.3, "tensor"]), st.booleans())
@anew
def test_gated_write(native, m, erase, token_mask):
    tokens = m["query"].shape[:-1]
    mask = torch.arange(tokens.numel()).reshape(tokens) % 3 != 1 if token_mask else None
    m = {**m, "erase": torch.sigmoid(m["write"].flip(-1)) if erase == "tensor" else None}

    def run(x, b):
        return mk.gated_write(
            x["values"],
            x["keys"],
            x["query"],
            x["write"],
            erase=erase if x["erase"] is None else x["erase"],
            scale=x["scale"],
            slot_mask=x["slot_mask"],
            token_mask=mask,
            return_retained=True,
            backend=b,
        )

    agrees(run, m, ["values", "keys", "query", "write", "slot_mask", "erase"], native)


@st.composite
def gathers(draw):
    tokens, memory = draw(shapes())
    t, n, v, k = draw(SIZES), draw(SIZES), draw(WIDTHS), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    indices = torch.randint(-1, n, (*tokens, t, k), generator=random) if n else torch.full((*tokens, t, k), -1)
    return {"values": draw(tensor(*memory, n, v)), "indices": indices, "weights": draw(tensor(*tokens, t, k))}


@given(gathers())
@anew
def test_sparse_read(native, m):
    agrees(
        lambda x, b: mk.sparse_read(x["values"], x["indices"], x["weights"], backend=b),
        m,
        ["values", "weights"],
        native,
    )


@st.composite
def parts(draw):
    lead = draw(shapes())[0]
    s, t, v = draw(st.integers(1, 6)), draw(SIZES), draw(WIDTHS)
    lses = draw(tensor(s, *lead, t))
    return {"reads": draw(tensor(s, *lead, t, v)), "lses": lses.masked_fill(lses > 1.0, -torch.inf)}


@given(parts())
@anew
def test_merge_reads(native, m):
    agrees(lambda x, b: tuple(mk.merge_reads(x["reads"], x["lses"], backend=b)), m, ["reads", "lses"], native)
