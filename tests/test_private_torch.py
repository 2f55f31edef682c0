"""Undocumented PyTorch is used in one file, and each use has a substitute."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from support import ROOT, close, randn, run_python

import memkernels as mk
from memkernels import _torch

HOME = "memkernels/_torch.py"
# triton_kernels never imports memkernels; the undocumented names that it uses are listed here.
ALSO = {
    ("triton_kernels/layout.py", "torch._assert_async"),
    ("triton_kernels/replay.py", "torch.utils._python_dispatch.TorchDispatchMode"),
    ("triton_kernels/replay.py", "torch.utils._pytree"),
}


def private(path: Path) -> set[str]:
    """The private names of torch in a file: ``torch._C.x``, ``from torch._x import y``, ``forward_ad._y``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            found |= {text} if text.split(".")[0] in ("torch", "forward_ad", "F", "nn") else set()
            found |= {f"torch.{node.attr}"} if node.attr.startswith("_dynamo") else set()
    return {x for x in found if any(p.startswith("_") and not p.startswith("__") for p in x.split("."))}


@pytest.mark.parametrize("folder", ["memkernels", "triton_kernels"])
def test_private_names_are_in_one_file(folder):
    paths = {str(p.relative_to(ROOT)): p for p in (ROOT / folder).rglob("*.py")}
    names = {(name, used) for name, path in paths.items() if name != HOME for used in private(path)}
    assert names <= ALSO, names - ALSO


def test_the_scan_finds_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import torch._dynamo\nfrom torch._C import x\nfrom torch.autograd import forward_ad\n"
        "forward_ad._current_level\ntorch.ops._y\nf._dynamo_marked_constant = True\ntorch.__version__\n"
    )
    assert private(path) == {
        "torch._dynamo",
        "torch._C.x",
        "forward_ad._current_level",
        "torch.ops._y",
        "torch._dynamo_marked_constant",
    }


ABSENT = {
    "_AutoDispatchBelowAutograd": "torch._C",
    "_are_functorch_transforms_active": "torch._C",
    "_current_level": "torch.autograd.forward_ad",
    "_is_any_autocast_enabled": "torch._C",
    "_dispatch_has_kernel_for_dispatch_key": "torch._C",
    "_len_torch_dispatch_stack": "torch._C",
}


@pytest.mark.parametrize("absent", ABSENT)
def test_what_stands_in_where_a_name_is_absent(absent):
    """The name is absent only while the file is imported, because torch itself uses it."""
    code = (
        "import importlib.util, sys, torch\n"
        f"owner, name = sys.modules[{ABSENT[absent]!r}], {absent!r}\n"
        f"found = importlib.util.spec_from_file_location('memkernels._torch', {str(ROOT / HOME)!r})\n"
        "sys.modules['memkernels._torch'] = module = importlib.util.module_from_spec(found)\n"
        "kept = getattr(owner, name)\n"
        "delattr(owner, name)\n"
        "found.loader.exec_module(module)\n"
        "setattr(owner, name, kept)\n"
        "import memkernels as mk\n"
        "from memkernels.backends import BACKENDS\n"
        "from memkernels.registration import OPS\n"
        "from promised import PROMISED\n"
        "q, k, v = (torch.randn(n, 4).double().requires_grad_() for n in (3, 5, 5))\n"
        "read = mk.softmax_read(q, k, v, backend='cpu')\n"
        "torch.testing.assert_close(read, mk.softmax_read(q, k, v, backend='reference'))\n"
        "got, want = (torch.autograd.grad(r.square().sum(), (q, k, v), create_graph=True)\n"
        "             for r in (read, mk.softmax_read(q, k, v, backend='reference')))\n"
        "torch.testing.assert_close(got, want)\n"
        "second = [torch.autograd.grad(sum(x.square().sum() for x in g), q)[0] for g in (got, want)]\n"
        "torch.testing.assert_close(*second)\n"
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    low = mk.softmax_read(q.float(), k.float(), v.float())\n"
        "assert low.dtype == torch.bfloat16, low.dtype\n"
        "gaps = [BACKENDS[0].gap(op, 'cpu', None, d) for op in PROMISED for d in OPS[op].directions]\n"
        "assert not any(gaps), gaps\n"
        "assert mk.backends.select('softmax_read', 'cpu', torch.float32, 'cpu', False, 'backward').name == 'cpu'\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiled_code_without_the_guard_asks_at_every_call(monkeypatch):
    monkeypatch.setattr(_torch, "can_guard", _torch.constant(lambda: False))
    tensors = [randn(3, 4), randn(5, 4), randn(5, 2)]
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "memkernels" in str(node.target))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: mk.softmax_read(*x), backend=look)
    for name, kernels in (("reference", []), ("cpu", ["memkernels_cpu.softmax_read.default"])):
        with mk.use_backend(name):
            close(compiled(*tensors), mk.softmax_read(*tensors, backend="reference"))
        assert seen == kernels, name
    torch._dynamo.reset()


def test_sizes_that_are_known_are_compared():
    assert _torch.known(True) and not _torch.known(False)
