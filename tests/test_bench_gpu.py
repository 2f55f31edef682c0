"""The benchmark on a GPU, without one: its cases and peers at small sizes, and timing by graphs with a stand-in."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from test_bench import QUICK, FlatCeilings, find, held, identity, reference

import bench.__main__
import memkernels as mk
from bench import harness, results, text, timers, variants
from bench.case import OWN
from bench.cases import all_cases, gated_write, memory_scan
from bench.check import PEER_SLACK, Exact
from bench.harness import Settings, run_case
from bench.peers import eager, fla, fla_gla, peers_of
from bench.sdpa import over_heads
from bench.timers import CudaTimer, take_turns
from bench.variants import d_output, own, prepare
from bench.variants import results as results_of
from memkernels import backends

ATTENTION = "SDPA+SDPA flash+SDPA cuDNN+SDPA efficient"
FASTEST = f"{ATTENTION}+FlexAttention"
FLA, GLA = "flash-linear-attention", "flash-linear-attention GLA"
GPU_GOALS = {
    ("softmax_read", "forward", "bfloat16", "T=4096 N=8192 K=V=128"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "B=4 H=8 T=4096 N=4096 K=V=128"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "K != V, T=4096 N=8192 K=128 V=256"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "K != V, B=4 H=8 T=2048 N=4096 K=128 V=256"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "K > 256, T=2048 N=4096 K=V=320"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "K > 256, B=2 H=8 T=2048 N=4096 K=V=320"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "shared memory, B=4 H=8 T=2048 N=8192 K=V=128"): FASTEST,
    ("softmax_read", "forward", "bfloat16", "T=1 N=2^20 K=V=128"): "copy",
    ("softmax_read", "forward", "bfloat16", "T=16 N=2^20 K=V=128"): "copy",
    ("softmax_read", "forward", "bfloat16", "B=4 H=8 T=16 N=32768 K=V=128"): "copy",
    ("softmax_read", "backward", "bfloat16", "T=4096 N=8192 K=V=128"): ATTENTION,
    ("softmax_read", "backward", "bfloat16", "B=4 H=8 T=2048 N=2048 K=V=128"): ATTENTION,
    ("gated_write", "forward", "bfloat16", "weak gates, T=4096 N=4096 K=V=128"): f"eager {FLA}+{GLA} peak",
    ("gated_write", "forward", "bfloat16", "weak gates, B=2 H=8 T=4096 N=4096 K=V=128"): f"eager {FLA}+{GLA} peak",
    ("gated_write", "backward", "bfloat16", "weak gates, T=4096 N=4096 K=V=128"): f"eager {GLA} peak",
    ("gated_write", "backward", "bfloat16", "weak gates, B=2 H=8 T=4096 N=4096 K=V=128"): f"eager {GLA} peak",
    ("topk_read", "forward", "float32", "T=512 N=2^18 K=V=128"): "eager",
    ("topk_read", "forward", "bfloat16", "T=512 N=2^18 K=V=128"): "eager",
    ("topk_read", "forward", "float32", "T=16 N=2^20 K=V=128"): "copy",
    ("topk_read", "forward", "bfloat16", "T=16 N=2^20 K=V=128"): "copy",
    ("sparse_read", "backward", "float32", "T=4096 N=2^20 V=256"): "copy embedding_bag",
    ("memory_scan", "forward", "bfloat16", "weak gates, T=8192 N=64 K=V=64"): GLA,
    ("memory_scan", "forward", "bfloat16", "weak gates, T=8192 N=512 K=V=128"): GLA,
    ("memory_scan", "forward", "bfloat16", "weak gates, B=2 H=8 T=8192 N=64 K=V=64"): GLA,
    ("memory_scan", "forward", "bfloat16", "weak gates, B=2 H=8 T=8192 N=512 K=V=128"): GLA,
}

GPU_CASES = all_cases("cuda")


def test_every_goal_has_a_case():
    assert held("cuda") == GPU_GOALS


@pytest.mark.parametrize("case", GPU_CASES, ids=[" ".join(identity(case)) for case in GPU_CASES])
@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_case_for_a_gpu_can_be_checked(case):
    """At its quick sizes on the CPU: the op and its peers pass, and a result that is 5% off fails."""
    inputs = case.make(case.quick, case.torch_dtype, "cpu", seed=0)
    d_out = d_output(case, inputs)
    exact = Exact(case, inputs, d_out)
    got = results_of(case, prepare(case, own(case), inputs, d_out))
    assert exact.error(got) <= exact.limit()
    assert exact.error([t * 1.05 for t in got]) > exact.limit()
    right = set()
    for name, make_run in peers_of(case, quick=True)[0].items():
        with contextlib.suppress(RuntimeError, ModuleNotFoundError):  # a back end of a GPU, fla
            assert exact.error(results_of(case, prepare(case, make_run, inputs, d_out))) <= PEER_SLACK * exact.limit()
            right.add(name)
    assert right >= ({"eager", "SDPA"} if case.op == "softmax_read" else {"eager"})


def test_work_grows_with_the_heads_and_a_shared_memory_is_counted_once():
    cases = {case.title(case.sizes): case for case in GPU_CASES if identity(case)[:2] == ("softmax_read", "forward")}
    own_memories = cases["B=4 H=8 T=4096 N=4096 K=V=128"]
    shared = cases["shared memory, B=4 H=8 T=2048 N=8192 K=V=128"]
    assert own_memories.flops(own_memories.sizes) == 32 * 2 * 4096 * 4096 * 256
    assert own_memories.bytes(own_memories.sizes, 2) == 32 * (4096 + 4096) * 256 * 2
    assert shared.flops(shared.sizes) == 32 * 2 * 2048 * 8192 * 256
    assert shared.bytes(shared.sizes, 2) == (8192 + 32 * 2048) * 256 * 2
    inputs = shared.make(shared.quick, torch.bfloat16, "cpu", seed=0)
    assert inputs["query"].dim() == 4 and inputs["keys"].dim() == inputs["values"].dim() == 2


@pytest.mark.parametrize("op", ["gated_write", "memory_scan"])
def test_weak_gates_leave_something_of_every_token(op):
    case = next(c for c in GPU_CASES if c.op == op)
    sizes = {**case.sizes, "N": 64}
    inputs = case.make(sizes, torch.float32, "cpu", seed=0)
    query = inputs["query" if op == "gated_write" else "write_query"]
    gates = torch.sigmoid(sizes["K"] ** -0.5 * query @ inputs["keys"].mT)
    assert 0.05 < torch.prod(1 - gates, 0).mean() < 0.5


@pytest.mark.parametrize("module", [gated_write, memory_scan], ids=["gated_write", "memory_scan"])
def test_eager_keeps_its_sums_of_logarithms_in_float32(module):
    """Gates that are wide open: the sums are of thousands."""
    case = next(c for c in GPU_CASES if c.op == module.CASES[0].op)
    inputs = module.make({"T": 2048, "N": 64, "K": 64, "V": 64}, torch.bfloat16, "cpu", seed=0)
    got = results_of(case, prepare(case, getattr(eager, case.op), inputs, None))
    assert got[0].dtype == torch.bfloat16 and case.check(inputs, None, got) < 0.05


def test_attention_gets_heads_and_one_of_all_tokens_where_they_share_a_memory():
    seen = []

    def attention(*tensors):
        seen.append([tuple(t.shape) for t in tensors])
        return torch.nn.functional.scaled_dot_product_attention(*tensors)

    read, keys, values = over_heads(attention), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    query = torch.randn(2, 3, 5, 8)
    assert torch.allclose(read(query, keys, values)(), mk.softmax_read(query, keys, values), atol=1e-5)
    shared = read(query, keys[0, 0], values[0, 0])()
    assert torch.allclose(shared, mk.softmax_read(query, keys[0, 0], values[0, 0]), atol=1e-5)
    assert seen == [[(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], [(1, 1, 30, 8), (1, 1, 7, 8), (1, 1, 7, 4)]]


def test_a_loop_over_tokens_is_no_peer_where_there_are_heads():
    writes = [c for c in GPU_CASES if c.op == "gated_write" and c.direction == "forward"]
    assert {"H" in c.sizes: "loop" in peers_of(c, quick=True)[0] for c in writes} == {False: True, True: False}


def test_a_check_by_head_sees_every_gradient_of_the_last_head():
    case = next(c for c in GPU_CASES if c.op == "gated_write" and c.direction == "backward" and "H" in c.sizes)
    inputs = case.make(case.quick, torch.float32, "cpu", seed=0)
    d_out = d_output(case, inputs)
    got = results_of(case, prepare(case, reference("gated_write"), inputs, d_out))
    assert case.check(inputs, d_out, got) < 1e-5
    for i in range(len(got)):
        spoilt = [t.clone() for t in got]
        spoilt[i][-1, -1] *= 1.1
        assert case.check(inputs, d_out, spoilt) > 1e-3


def stand_in_fla(monkeypatch):
    """fla's two functions as loops over tokens, [B, T, H, D], with the arguments of fla-core 0.6."""

    def chunk_gla(q, k, v, g, scale, initial_state, output_final_state):
        state, reads = initial_state, []
        for t in range(q.shape[1]):
            state = g[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            reads.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
        return torch.stack(reads, 1), state if output_final_state else None

    def chunk_local_cumsum(g, chunk_size, scale):
        return torch.cat([scale * part.cumsum(1) for part in g.split(chunk_size, 1)], 1)

    def chunk_fwd_h(k, v, gk, h0, output_final_state, split_size):
        assert split_size % fla.CHUNK == 0 and split_size >= k.shape[1]
        parts = zip(*(x.split(fla.CHUNK, 1) for x in (k, v, gk)))
        for keys, values, sums in parts:
            last = sums[:, -1:]
            added = torch.einsum("bthk,bthv->bhkv", keys * torch.exp2(last - sums), values)
            h0 = torch.exp2(last[:, 0]).unsqueeze(-1) * h0 + added
        return None, h0

    found = {
        "fla.ops.gla": {"chunk_gla": chunk_gla},
        "fla.ops.common.chunk_h": {"chunk_fwd_h": chunk_fwd_h},
        "fla.ops.utils": {"chunk_local_cumsum": chunk_local_cumsum},
        "fla.ops.utils.constant": {"RCP_LN2": 1 / torch.tensor(2.0).log().item()},
    }
    for name in ("fla", "fla.ops", "fla.ops.common", *found):
        module = types.ModuleType(name)
        vars(module).update(found.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("case", [c for c in GPU_CASES if hasattr(fla_gla, c.op)], ids=lambda c: " ".join(identity(c)))
def test_fla_computes_the_same(case, monkeypatch):
    stand_in_fla(monkeypatch)
    inputs = case.make(case.quick, torch.float32, "cpu", seed=0)
    d_out = d_output(case, inputs)
    for peer in (fla, fla_gla):
        if hasattr(peer, case.op) and case.direction in peer.DIRECTIONS:
            got = results_of(case, prepare(case, getattr(peer, case.op), inputs, d_out))
            assert case.check(inputs, d_out, got) < 1e-4


class FakeCuda:
    """Stands in for CUDA: a graph is the list of calls that it captured, and every run takes as long as ``taking``.

    ``refuses``: what raises, waiting or capturing.
    """

    def __init__(self, refuses: str = "", taking: float = 1e-3) -> None:
        self.refuses, self.taking = refuses, taking
        self.seen: list[int] = []
        self.graphs: list[list[int]] = []
        self.replayed = self.waited = 0

    def calls(self, sets: int = 3) -> list:
        return [lambda i=i: self.seen.append(i) for i in range(sets)]

    def wait(self) -> None:
        self.waited += 1

    def refuse_to_wait(self, run) -> None:
        if self.refuses == "waiting":
            raise RuntimeError("called a synchronizing CUDA operation")
        run()

    def capture(self, run):
        first = len(self.seen)
        run()
        if self.refuses == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graphs.append(self.seen[first:])

        def replay():
            self.replayed += 1

        return replay

    def seconds(self, run) -> float:
        run()
        return self.taking


def test_a_graph_holds_the_call_on_every_input_set():
    cuda = FakeCuda()
    timer = CudaTimer(cuda.calls(), cuda)
    assert timer.timed == "graph" and timer.width == 3
    [captured] = cuda.graphs
    assert sorted(captured) == [0, 1, 2]
    eager = len(cuda.seen)
    assert timer.seconds(7) == cuda.taking and cuda.replayed == 7
    assert len(cuda.seen) == eager  # the replay is timed, not the eager call
    spread = take_turns({"a": timer}, seconds=0.01)["a"]
    assert spread.median == pytest.approx(cuda.taking / (5 * 3))  # 5 replays fill the shortest sample
    assert spread.timed == "graph" and spread.host > 0


def test_a_graph_of_slow_calls_holds_fewer_of_them():
    cuda = FakeCuda(taking=0.4 * timers.CAPTURED)
    assert CudaTimer(cuda.calls(), cuda).width == 2
    cuda = FakeCuda(taking=10 * timers.CAPTURED)
    assert CudaTimer(cuda.calls(), cuda).width == 1


@pytest.mark.parametrize("refuses", ["waiting", "capturing"])
def test_what_cannot_be_captured_is_timed_by_events(refuses, capsys):
    cuda = FakeCuda(refuses)
    timer = CudaTimer(cuda.calls(), cuda)
    assert timer.timed == "events" and timer.width == 1 and cuda.graphs == []
    assert "timed by events: " in capsys.readouterr().err
    del cuda.seen[:]
    assert timer.seconds(6) == cuda.taking
    assert sorted(cuda.seen) == [0, 0, 1, 1, 2, 2]  # every call uses the next inputs
    assert take_turns({"a": timer}, seconds=0.01)["a"].timed == "events"


def test_host_time_is_that_of_calls_into_an_empty_queue(monkeypatch):
    cuda, now = FakeCuda(), [0.0]
    timer = CudaTimer([lambda: now.__setitem__(0, now[0] + 1e-4)], cuda)
    in_a_row, issue = [], timer.issue
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timer, "issue", lambda count: (in_a_row.append(count), issue(count)))
    monkeypatch.setattr(cuda, "wait", lambda: now.__setitem__(0, now[0] + 1.0))  # host time must exclude this
    assert timer.host() == pytest.approx(1e-4)
    assert in_a_row == [1] + [timers.HOST_CALLS] * timers.HOST_SAMPLES
    assert timers.HOST_CALLS * 40 < 1000  # launches that the queue of a device holds


def test_rows_say_how_they_were_timed_and_what_a_call_costs_the_processor(monkeypatch):
    made = []

    def timer(calls, device):
        if len(made) == 2:
            raise RuntimeError("out of memory")
        made.append(CudaTimer(calls, FakeCuda("capturing" if made else "")))
        return made[-1]

    monkeypatch.setattr(harness, "timer", timer)
    row = run_case(find("softmax_read"), QUICK, extra={OWN: reference("softmax_read")})
    assert row["timed"] == "graph" and 0 < row["host"] < 1
    by_events, failed = row["peers"].values()
    assert by_events["timed"] == "events" and 0 < by_events["host"] < 1 and by_events["median"] > 0
    assert failed["median"] is None and "out of memory" in failed["why"]
    row = results.complete(row, find("softmax_read"), FlatCeilings(), {"device": "cuda"})
    assert ", host " in text.columns(row)[text.HEADER.index("median")]
    assert text.median({**row, "timed": "events"}).endswith(", by events")
    assert text.columns({**row, "backend": "triton"})[0] == "softmax_read (triton)"
    assert text.bandwidth_name(row) == "copy bandwidth"


def test_a_named_backend_is_the_one_that_runs():
    seen = []

    def spy(**kw):
        return lambda: (seen.append(backends.requested()), mk.softmax_read(**kw))[1]

    row = run_case(find("softmax_read"), QUICK, extra={"spy": spy}, backend="reference")
    assert row["backend"] == "reference" and row["median"] > 0 and set(seen) == {"reference"}
    assert backends.requested() == "auto"
    gap = run_case(find("softmax_read"), QUICK, backend="cuda")
    assert gap["backend"] == "" and gap["median"] is None and "'cuda'" in gap["why"]


def test_every_backend_with_a_kernel_is_timed_on_a_gpu(monkeypatch):
    case = GPU_CASES[0]
    gap = lambda own, op, device, dtype, direction: None if device in own.devices else "no"  # noqa: E731
    monkeypatch.setattr(backends.Backend, "gap", gap)
    assert variants.own_backends(case, "cuda") == ["triton", "cuda"]
    assert variants.own_backends(case, "cpu") == [None]
    monkeypatch.setattr(backends.Backend, "gap", lambda *_: "no")
    assert variants.own_backends(case, "cuda") == [None]  # one row, which says why


def test_goals_are_judged_on_the_fastest_of_our_backends(monkeypatch):
    case = find("softmax_read")
    speed = {"triton": 2e-3, "cuda": 1e-3}

    def fake_run(case, settings, backend):
        row = {"op": case.op, "case": "", "direction": "forward", "dtype": "float32", "sizes": dict(case.sizes)}
        row |= {"unit": "s", "flops": 85_000_000, "bytes": 1, "backend": backend, "median": speed[backend], "why": ""}
        return row | {"low": 0, "high": 0, "peers": {"SDPA": {"median": 3e-3, "why": ""}}}

    monkeypatch.setattr(bench.__main__, "own_backends", lambda case, device: list(speed))
    monkeypatch.setattr(bench.__main__, "run_case", fake_run)
    slow, fast = bench.__main__.measure([case], Settings("cpu", torch.get_num_threads(), quick=True))
    assert (slow["backend"], fast["backend"]) == ("triton", "cuda")
    assert [goal["reached"] for goal in slow["goals"]] == [None, None] and slow["reached"] is None
    assert {goal["why"] for goal in slow["goals"]} == {"judged on cuda"}
    assert None not in [goal["reached"] for goal in fast["goals"]]
    assert results.key(slow) != results.key(fast)
    wrong = {**slow, "median": None}
    assert [row["reached"] for row in results.best_of_ours([wrong, fast])] == [None, fast["reached"]]
