"""States of modules and models load as torch.load does by default, in a process that imported memkernels alone."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from support import run_python

import memkernels as mk
from memkernels._states import STATES


def states() -> dict:
    use = mk.nn.SlotUse.none(2, 5).after_read(torch.rand(2, 5), 3)
    return {
        "memory": mk.nn.ExternalMemory(5, 4, 8).initial_state(2),
        "streaming": mk.nn.StreamingMemory(8, 5, heads=2).initial_state(3),
        "cache": mk.nn.NeuralCache(4, 8).initial_state(2),
        "ngrams": mk.nn.NgramMemory(8, 5).initial_history(2),
        "use": use,
        "rnn": mk.models.MemoryRNN(3, 4, 5).initial_state(2),
        "output": mk.models.MemoryTransformerLM(11, d_model=8, heads=2, layers=1, mem_size=4)(torch.zeros(1, 3).long()),
    }


LOAD = """
import sys
import memkernels, torch
assert "memkernels.nn" not in sys.modules and "memkernels.models" not in sys.modules
loaded = torch.load(sys.argv[1])
assert loaded["step"] == 3
for name, state in loaded["states"].items():
    print(name, type(state).__module__, type(state).__qualname__, type(state)._fields)
loaded["states"]["use"].after_write(torch.ones(2, 5), 1)
torch.save(loaded, sys.argv[1] + ".again")
torch.load(sys.argv[1] + ".again")
"""


def test_a_fresh_process_loads_every_state(tmp_path):
    saved, path = states(), tmp_path / "checkpoint.pt"
    torch.save({"states": saved, "step": 3}, path)
    done = run_python(LOAD, str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name} {type(s).__module__} {type(s).__qualname__} {type(s)._fields}" for name, s in saved.items()
    ]


@pytest.mark.parametrize("name", states())
def test_what_is_loaded_is_what_was_saved(tmp_path, name):
    state = states()[name]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert type(loaded) is type(state)
    assert all(torch.equal(a, b) for a, b in zip(loaded, torch.load(tmp_path / "state.pt", weights_only=False)))
    assert [x.shape for x in loaded] == [x.shape for x in state]


def test_every_state_is_registered():
    found = set()
    for package in (mk.nn, mk.models):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            for kind in vars(importlib.import_module(module.name)).values():
                if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
                    found.add(f"{kind.__module__}.{kind.__qualname__}")
    assert found == set(STATES)
