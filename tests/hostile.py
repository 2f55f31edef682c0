"""Calls one native operator with arguments that no checked caller would pass. test_hostile.py runs it as a process.

Prints a line before each call, so the last one names the call that killed the process, and at the end DONE. A call that
must be refused and is not is printed as ACCEPTED.
"""

from __future__ import annotations

import sys

import torch
from support import CASE, operator, subject

from memkernels.registration import OPS
from memkernels.spec import Axis, check, letters, several

name, backend, direction = sys.argv[1:4]
op = OPS[name]
INT_MIN, HUGE = -(2**63), 2**62
# Checking indices would make the host wait for a GPU. There they must do no harm: test_simt_contract.py.
FITS = {"pad": lambda value: True, "block": lambda value: value > 0}  # options that may be almost any number
LOOKS_AT_INDICES = backend != "cuda"


def attempt(what: str, arguments: list, must_raise: bool = True) -> None:
    print(what, flush=True)
    try:
        run(*arguments)
    except Exception:
        return
    if must_raise:
        print(f"ACCEPTED {what}", flush=True)


def attempt_range(what: str, i: int, changed: torch.Tensor) -> None:
    """Any integers make a range: results are those of the range clipped to the slots there are."""
    print(what, flush=True)
    clipped = changed.contiguous().clamp(0, Axis.parse(op.args[i].of).size(bound))
    got, wanted = several(run(*put(i, changed))), several(run(*put(i, clipped)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


# The case with the most arguments that the op takes.
wanted = (
    "map, history, packed and ignored",
    "erase tensor, both masks",
    "erase tensor, token mask",
    "erase tensor",
    "ranges, float mask",
    "float mask",
    "usual",
)
case = next(c for c in wanted if CASE[c].fits(op))
inputs = subject(name, case, torch.float32).inputs
tensors = [t if t is None or not t.is_floating_point() else torch.nan_to_num(t) for t in inputs.tensors]
names = [a.name for a in op.args]
axes = [a.axes.split() for a in op.args]
params = list(inputs.params)
if all(t is None or t.dim() == len(own) for t, own in zip(tensors, axes)):  # then nothing would tell streams apart
    tensors = [t if t is None or a.flat else torch.stack([t, t]) for t, a in zip(tensors, op.args)]
masks = {a.name for a in op.args if a.dtype == "mask"}
ranges = {a.name for a in op.args if a.dtype == "range"}
bound = check(op, tensors, params).axes
# How many slots the indices of each argument, and of each result that the backward pass takes, may name.
free = {a.name for a in op.args if not a.of} | {f"saved {o.name}" for o in op.outputs if not o.of}
places = {a.name: Axis.parse(a.of).size(bound) for a in op.args if a.dtype == "index"}
places |= {f"saved {o.name}": Axis.parse(o.of).size(bound) for o in op.outputs if o.dtype == "index"}
run = operator(backend, name)

if direction == "backward":
    results = several(run(*tensors, *params))
    by_name = {o.name: (o, r) for o, r in zip(op.outputs, results)}
    for saved in op.saved:
        names.append(f"saved {saved}")
        axes.append(by_name[saved][0].axes.split())
        tensors.append(by_name[saved][1])
    for o, r in zip(op.outputs, results):
        if o.grad:
            names.append(f"gradient of {o.name}")
            axes.append(o.axes.split())
            tensors.append(torch.randn_like(r))
    params.append([True] * len(op.differentiable))
    run = operator(backend, f"{name}_backward")
if direction == "in place":
    run = operator(backend, f"{name}_")


def put(i: int, tensor) -> list:
    return [*tensors[:i], tensor, *tensors[i + 1 :], *params]


run(*[t if t is None else t.clone() for t in tensors], *params)  # unchanged, the arguments must be accepted

leading = [i for i in range(len(names)) if i >= len(op.args) or not op.args[i].flat]
for i, (label, own, t) in enumerate(zip(names, axes, tensors)):
    if t is None:
        continue
    others = set().union(*(letters(" ".join(b)) for j, b in enumerate(axes) if j != i and tensors[j] is not None))
    for d in (d for d, a in enumerate(own) if letters(a) <= others):  # bound by another argument, or a fixed size
        dim = t.dim() - len(own) + d
        attempt(f"{label}: axis {own[d]} shorter", put(i, t.narrow(dim, 0, t.shape[dim] - 1)))
        attempt(f"{label}: axis {own[d]} longer", put(i, torch.cat([t, t.narrow(dim, 0, 1)], dim)))
        attempt(f"{label}: axis {own[d]} empty", put(i, t.narrow(dim, 0, 0)))
    attempt(f"{label}: no dimensions", put(i, torch.zeros((), dtype=t.dtype)))
    attempt(f"{label}: one dimension too few", put(i, t.flatten()[: t.shape[-1]] if len(own) > 1 else t.flatten()[0]))
    attempt(
        f"{label}: 70 dimensions",
        put(
            i,
            t.reshape([1] * 70 + list(t.shape)[-len(own) :])
            if t.dim() == len(own)
            else t[(0,) * (t.dim() - len(own))].reshape([1] * 62 + list(t.shape)[-len(own) :]),
        ),
        must_raise=False,
    )
    alone = [j for j in leading if tensors[j] is not None] == [i]  # then its streams are those of the call
    attempt(f"{label}: other streams", put(i, torch.cat([t, t, t[:1]])), must_raise=i in leading and not alone)
    for dtype in (torch.int32, torch.complex64, torch.uint8, torch.float8_e4m3fn):
        fits = t.dtype == torch.int8 and dtype == torch.float8_e4m3fn
        attempt(f"{label}: {dtype}", put(i, torch.zeros(t.shape, dtype=dtype)), must_raise=not fits)
    if t.is_floating_point():
        attempt(f"{label}: int64", put(i, torch.zeros(t.shape, dtype=torch.int64)))
        attempt(f"{label}: float64 among float32", put(i, t.double()))
    else:
        attempt(f"{label}: float32", put(i, torch.zeros(t.shape)), must_raise=label not in masks)
    attempt(f"{label}: on the meta device", put(i, t.to("meta")), must_raise=False)
    attempt(f"{label}: sparse", put(i, t.to_sparse()))
    attempt(f"{label}: not a tensor", put(i, "text"))
    if i < len(op.args) and not op.args[i].optional:
        attempt(f"{label}: missing", put(i, None))
    attempt(
        f"{label}: overlapping",
        put(i, t[:1].expand(t.shape)),
        must_raise=direction == "in place" and label == op.inplace,
    )
    attempt(
        f"{label}: a negative view",
        put(i, torch._neg_view(t)) if t.is_floating_point() else put(i, t),
        must_raise=False,
    )
    if label in ranges:
        for wild in (-1, 2**31, 2**40, 2**62, 2**63 - 1, INT_MIN):
            for at in (0, 1, t.numel() - 2, t.numel() - 1):  # the first and the stop of the first and the last token
                changed = t.clone()
                changed.view(-1)[at] = wild
                attempt_range(f"{label}: {wild} at {at}", i, changed)
            attempt_range(f"{label}: {wild} everywhere", i, torch.full_like(t, wild))
        attempt_range(f"{label}: all numbers", i, torch.tensor([INT_MIN, 2**63 - 1]).expand(t.shape))
        attempt_range(f"{label}: backwards", i, torch.tensor([2**63 - 1, INT_MIN]).expand(t.shape))
        attempt_range(f"{label}: as columns", i, t.mT.contiguous().mT)
    elif t.dtype == torch.int64:
        for wild in (places[label], -2, 2**31, 2**40, 2**63 - 1, INT_MIN):
            for at in (0, t.numel() - 1):
                changed = t.clone()
                changed.view(-1)[at] = wild
                attempt(f"{label}: {wild} at {at}", put(i, changed), must_raise=LOOKS_AT_INDICES and label not in free)

for p, (label, kind) in enumerate(op.params):
    wild = {"int": [0, -1, INT_MIN, 2**40, HUGE], "float": [float("nan"), float("inf"), -0.0, 1e308], "bool": []}
    wild |= {"ScalarType": [torch.int64, torch.bool, torch.complex64], "int[]": [[], [0], [-1], [INT_MIN, HUGE]]}
    for value in wild[kind]:
        changed = [*params[:p], value, *params[p + 1 :]]
        fits = label in FITS and FITS[label](value)
        refused = kind != "float" and direction == "forward" and not fits
        attempt(f"{label} = {value}", [*tensors, *changed], must_raise=refused)
if direction == "backward":
    for wants in ([], params[-1][:-1], [*params[-1], True], [True] * 100):
        attempt(f"wants of length {len(wants)}", [*tensors, *params[:-1], wants])
if direction == "in place":
    i = names.index(op.inplace)
    shared = [a.name for a in op.args if a.side == "memory"] == [op.inplace]  # then one memory may serve all streams
    attempt("memory that lacks leading dimensions", put(i, tensors[i][:1]), must_raise=not shared)
print("DONE")
