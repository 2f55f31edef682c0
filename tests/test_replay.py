"""Launch plans of the Triton backend: a plan recorded once for a kind of call is right for every call of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

pytest.importorskip("triton")
START = """
import json
import torch
from torch import Tensor
from memkernels import _triton
import memkernels as mk

package = _triton.kernels()
import importlib
replay, builds = (importlib.import_module(f"{package.__name__}.{n}") for n in ("replay", "builds"))

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def same(got, *args):
    want = mk.softmax_read(*(x.double() for x in args), backend="reference")
    return torch.allclose(got.double(), want, atol=1e-5)
"""


# Runs snippets from standard input, one per line, and answers with the last line that each printed, or why it failed.
# torch and Triton are imported once for all of them.
SERVER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(json.loads(line), {})
        print(said.getvalue().splitlines()[-1], flush=True)
    except Exception:
        print(json.dumps({"failed": traceback.format_exc()}), flush=True)
"""


@contextlib.contextmanager
def answering(**environment: str):
    """A function that runs a piece of code after ``START`` and returns what it printed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:

        def answer(code: str):
            print(json.dumps(START + code), file=server.stdin, flush=True)
            result = json.loads(server.stdout.readline())
            assert not (isinstance(result, dict) and "failed" in result), result["failed"]
            return result

        yield answer
        server.stdin.close()


@pytest.fixture(scope="module")
def interpreted():
    with answering(TRITON_INTERPRET="1") as answer:
        yield answer


@pytest.fixture(scope="module")
def answer():
    with answering() as answer:
        yield answer


def test_a_second_call_of_a_kind_has_its_own_numbers(interpreted):
    found = interpreted("""
launch = package.launcher("softmax_read")
ok = []
for seed in range(3):
    q, k, v = randn(2, 5, 16, seed=seed), randn(2, 40, 16, seed=seed + 10), randn(2, 40, 16, seed=seed + 20)
    ok.append(same(launch(q, k, v, None, None, 0.25)[0], q, k, v))
print(json.dumps([ok, len(launch.replays)]))
""")
    assert found == [[True] * 3, 1]


def test_tensors_may_share_memory_in_one_call_and_not_in_the_next(interpreted):
    """A plan holds pointers as argument and offset; it must not remember which arguments share a storage."""
    found = interpreted("""
launch = package.launcher("softmax_read")
together = randn(2, 40, 48)
q, k, v = (together[..., 16 * i : 16 * (i + 1)] for i in range(3))
apart = [torch.empty_strided(x.shape, x.stride()).copy_(randn(2, 40, 16, seed=i)) for i, x in enumerate((q, k, v))]
ok = [same(launch(*x, None, None, 0.25)[0], *x) for x in ((q, k, v), apart, (q, q, q), (apart[0], k, k))]
print(json.dumps([ok, len(launch.replays)]))
""")
    assert found[0] == [True] * 4
    assert found[1] == 1, "all four have the same shapes and strides"


def test_strides_options_and_dtypes_are_other_kinds(interpreted):
    found = interpreted("""
launch = package.launcher("softmax_read")
q, k, v = randn(2, 5, 16), randn(2, 40, 16, seed=1), randn(2, 40, 16, seed=2)
spread = k[:1].expand(2, 40, 16)
turned = v.transpose(-1, -2).contiguous().transpose(-1, -2)
kinds = [(q, k, v), (q, spread, v), (q, k, turned), (q[:, ::2], k, v), (q.half(), k.half(), v.half())]
ok = []
for x in kinds:
    want = mk.softmax_read(*(y.double() for y in x), backend="reference")
    atol = 1e-5 if x[0].dtype == torch.float32 else 1e-2
    ok.append(torch.allclose(launch(*x, None, None, 0.25)[0].double(), want, atol=atol))
other = launch(q, k, v, None, None, 0.5)[0]
ok.append(torch.allclose(other.double(), mk.softmax_read(q.double(), k.double(), v.double(), scale=0.5), atol=1e-5))
print(json.dumps([ok, len(launch.replays)]))
""")
    assert found == [[True] * 6, 6]


def test_a_launcher_cannot_look_at_a_number(interpreted):
    """A launcher may depend on shapes only: a replay would be wrong for other numbers."""
    found = interpreted("""
def looks(x):
    return x * 2 if x[0] > 0 else x

try:
    replay.Launcher(looks, lambda device: ("interpreter", 0))(randn(4))
    print(json.dumps("it may"))
except RuntimeError as error:
    print(json.dumps(type(error).__name__))
""")
    assert found == "RuntimeError"


def test_memory_is_let_go_after_the_step_that_needs_it_last(interpreted):
    """A replay holds no more memory at once than the launcher did."""
    found = interpreted("""
import weakref
alive = []

def in_pieces(x):
    total = torch.zeros_like(x)
    for i in range(4):
        piece = x * i + 1
        total += piece * piece
    return total

launch = replay.Launcher(in_pieces, lambda device: ("interpreter", 0))
x = randn(1000)
first = launch(x)
made, peak = [], 0
from torch.utils._python_dispatch import TorchDispatchMode
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global peak
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(result is a for a in args):
            made.append(weakref.ref(result))
        peak = max(peak, sum(m() is not None for m in made))
        return result
with Watch():
    second = launch(x)
print(json.dumps([torch.equal(first, second), torch.equal(first, in_pieces(x)), len(made), peak]))
""")
    assert found[:2] == [True, True]
    assert found[2] > 8, "the pieces are made anew each time"
    assert found[3] <= 4, "the total, and what one step of the loop needs"


def test_views_begin_where_they_did(interpreted):
    found = interpreted("""
def parts(x):
    return x[2:] + x[:-2].flip(0), x[1:, 1:]

launch = replay.Launcher(parts, lambda device: ("interpreter", 0))
whole = randn(7, 5)
ok = [all(map(torch.equal, launch(x), parts(x))) for x in (whole, randn(7, 5, seed=1), whole[:6, :3], whole[1:, 2:])]
print(json.dumps([ok, len(launch.replays)]))
""")
    assert found == [[True] * 4, 3]


def test_tensors_of_several_devices_are_refused(interpreted):
    found = interpreted("""
launch = package.launcher("softmax_read")
q, k, v = randn(2, 5, 16), randn(2, 40, 16), randn(2, 40, 16)
launch(q, k, v, None, None, 0.25)
class Elsewhere(Tensor):
    def get_device(self):
        return 0
    @property
    def device(self):
        return torch.device("cuda", 0)
try:
    launch(q, k.as_subclass(Elsewhere), v, None, None, 0.25)
    print(json.dumps("taken"))
except RuntimeError as error:
    print(json.dumps(str(error)))
""")
    assert found == "softmax_read: all tensors must be on cpu, got cuda:0"


COMPILED = """
from bench.compile import replay as _
from bench.launches import plain

def identities(name, *shapes, dtype=torch.bfloat16, aligned=(), **more):
    recording = replay.Recording("90", 90, torch.device("cuda", 0), aligned)
    given = []
    for x in shapes:
        if isinstance(x, tuple):
            x = torch.empty(x, dtype=dtype, device="meta")
        if isinstance(x, Tensor):
            recording.place(x)
        given.append(x)
    with recording:
        plain(name)(*given)
    return [build.identity for *_, build in recording.launches]

def read(T=64, N=256, K=64, V=64, B=2, **more):
    return identities("softmax_read", (B, T, K), (B, N, K), (B, N, V), None, None, 0.125, **more)
"""


def test_a_kernel_serves_all_counts_of_tokens_slots_and_batches(answer):
    """Two at most: one for counts that are multiples of 16, one for the others."""
    found = answer(
        COMPILED
        + """
base = read(B=200)  # enough programs: the loop over slots is not cut into parts, which are float32
same = [read(B=300), read(B=200, T=1024), read(B=200, N=4096), read(B=400, T=16, N=16)]
odd = [read(B=200, T=65, N=257), read(B=301, T=1001, N=999), read(B=200, T=1, N=5)]
print(json.dumps([len(base), [x == base for x in same], [x == odd[0] for x in odd], odd[0] != base]))
"""
    )
    assert found == [1, [True] * 4, [True] * 3, True]


def test_cutting_a_loop_into_other_parts_compiles_nothing_new(answer):
    found = answer(
        COMPILED
        + """
kinds = [read(B=1, T=16, N=n) for n in (4096, 8192, 65536, 1 << 20)]
print(json.dumps([len(kinds[0]), [x == kinds[0] for x in kinds]]))
"""
    )
    assert found == [2, [True] * 4]


def test_wide_loads_are_told_to_the_compiler_and_only_where_they_are(answer):
    found = answer(
        COMPILED
        + """
base = read()
print(json.dumps([read(K=60) != base, read(V=60) != base, read(aligned=(False,)) != base,
                  read(aligned=(True, True, True)) == base, read(dtype=torch.float16) != base]))
"""
    )
    assert found == [True] * 5


def test_a_stride_of_a_dimension_of_size_one_does_not_matter(answer):
    found = answer(
        COMPILED
        + """
odd = torch.empty_strided((200, 1, 64), (64, 7, 1), dtype=torch.bfloat16, device="meta")
args = ((200, 256, 64), (200, 256, 64), None, None, 0.125)
print(json.dumps(identities("softmax_read", odd, *args) == identities("softmax_read", (200, 1, 64), *args)))
"""
    )
    assert found is True


def test_a_compiled_kernel_gets_addresses_and_strides(answer):
    """The arguments of the C launcher, with host memory; no kernel runs."""
    found = answer(
        COMPILED
        + """
recording = replay.Recording("90", 90, torch.device("cuda", 0))
shapes = {"q": (200, 16, 64), "k": (200, 256, 64), "v": (200, 256, 64), "mask": (200, 256)}
given = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
for x in given.values():
    recording.place(x)
with recording:
    plain("softmax_read")(given["q"], given["k"], given["v"][..., 32:], given["mask"], None, 0.125)
launch = recording.steps[-1]
launch.kernel, launch.function, launch.packed, launch.stream = launch, "function", "packed", lambda device: 7
got = []
launch.run = lambda *arguments: got.extend(arguments)
places = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes.values()]
places += [torch.zeros(200, 16, 32, dtype=torch.bfloat16), torch.zeros(200, 16), torch.zeros(200, 16)]
launch(places)

def leaves(name, kind):
    if isinstance(kind, tuple):
        fields = getattr(kind, "_fields", range(len(kind)))
        return [leaf for field, part in zip(fields, kind) for leaf in leaves(f"{name}.{field}", part)]
    return [] if kind == "constexpr" else [name]

names = [leaf for name, kind in launch.build.signature.items() for leaf in leaves(name, kind)]
arguments = dict(zip(names, got[9:], strict=True))
starts = [x.data_ptr() for x in places]
def of(name, *parts):
    return [arguments[f"{name}.{i}"] for i in parts]
print(json.dumps([
    got[:6] == [launch.programs, 1, 1, 7, "function", "packed"],
    of("q", 0, 2, 4) == [starts[0], 16 * 64, 64],  # strides of batches and rows: the others are of size 1
    of("k", 0, 2, 3) == [starts[1], 256 * 64, 64],
    of("v", 0, 2, 3) == [starts[2] + 2 * 32, 256 * 64, 64],
    of("mask", 0, 2) == [starts[3], 256],
    of("read", 0, 2, 4) == [starts[4], 16 * 32, 32],
    [arguments[f"sizes.{name}"] for name in "TNKV"] == [16, 256, 64, 32], arguments["scale"] == 0.125,
    not {"k_scale", "mask.3", "BLOCK_T"} & set(names),  # constants of the machine code
]))
"""
    )
    assert found == [True] * 9


def test_gates_that_are_given_lie_along_slots_whose_count_is_told(answer):
    found = answer(
        COMPILED
        + """
def write(N):
    return identities("slot_write", (2, N, 64), (2, 64, N), (2, 64, 64), None, None, 1.0)
print(json.dumps([write(256) == write(512), write(256) != write(250)]))
"""
    )
    assert found == [True, True]
