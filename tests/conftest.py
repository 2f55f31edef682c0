"""What every test file shares: the backends under test and the settings of hypothesis."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Test files run in parallel, one worker per processor, so more threads per worker would only compete. A test that
# depends on the number of threads sets it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import quick
import torch
from support import BACKENDS, NATIVE

from memkernels import registration

# derandomize: the same examples on every run, so that a failure is reproducible.
hypothesis.settings.register_profile("memkernels", deadline=None, max_examples=40, derandomize=True, database=None)
hypothesis.settings.load_profile("memkernels")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only what finds most mistakes (quick.py)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        wanted = [item for item in items if quick.wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("quick"):
        terminalreporter.write_line(quick.left_out())


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Every backend, one after the other. A backend that is missing fails its tests: the call raises."""
    return request.param


@pytest.fixture(params=NATIVE)
def native(request) -> str:
    """Every backend that is compared with the reference."""
    return request.param


@pytest.fixture(autouse=True)
def plans(request):
    """Clear the plans of calls around a test that patches something, so that no plan outlives the patch."""
    patched = "monkeypatch" in request.fixturenames
    if patched:
        registration._plans.clear()
    yield
    if patched:
        registration._plans.clear()


@pytest.fixture
def memory_path():
    """A folder in memory, where the machine has one, for tests that need files but not a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def threads():
    """Sets the number of threads and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
