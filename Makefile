# Each target sets up .venv when it is missing, or uses the interpreter given as PYTHON= without touching the network.
#   make dev | demo | test | test-quick | test-torch | test-transformers | lint | format | docs | bench
#   make sanitize | wheel | wheel-test | cuda | crash-lab | gpu-check | gpu-rehearsal | clean

ifdef PYTHON
  PY := $(PYTHON)
  READY := .build/given
  PIP_FLAGS := --no-index
else
  PY := .venv/bin/python
  READY := .venv/.ready
  PIP_FLAGS :=
endif
CLANG_FORMAT := $(PY) -c "import clang_format; clang_format.clang_format()"
CSRC := $(wildcard $(foreach suffix,cpp h cu,csrc/*/*.$(suffix) csrc/*/*/*.$(suffix)))
NATIVE := $(CSRC) $(wildcard csrc/*.cmake csrc/*/*.cmake) CMakeLists.txt setup.py \
	pyproject.toml $(wildcard build_backend/*.py memkernels/_stamp.py)

SOURCES := $(CSRC) $(wildcard tests/*/*.c tests/*/*.cpp tests/*/*.h bench/gpu/stand_in/*)

# A stand-in for a header of torch, at the path of that header.
SOURCES += tests/native/torch_stand_in/torch/csrc/stable/ops.h

# Test files run in parallel where pytest-xdist is installed, the longest first.
SIDE_BY_SIDE := -n auto --maxprocesses=8 --dist loadfile
PYTEST = $(PY) -m pytest $$($(PY) -c "import xdist" 2>/dev/null && printf '%s ' $(SIDE_BY_SIDE))

.PHONY: dev demo test test-quick test-torch test-transformers lint format docs bench sanitize crash-lab cuda gpu-check gpu-rehearsal wheel wheel-test clean

dev: .build/native

demo: .build/native
	$(PY) -m memkernels demo

test: .build/native
	$(PYTEST) tests/test_triton.py tests/test_install.py tests

# While you change code: the tests that find most mistakes (tests/quick.py), in under two minutes on two cores.
test-quick: .build/native
	$(PYTEST) --quick tests/test_triton.py tests

# The core of the tests under another torch, downloaded once, such as VERSION=2.10.0.
test-torch: .build/native
	$(PY) -m bench.other_torch $(VERSION)

# The tests of pretrained models with memories under another transformers, installed once into a folder of its own under
# .build, such as VERSION=4.57.6.
test-transformers: .build/native
	$(PY) -m bench.other_transformers $(VERSION)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(SOURCES)
	$(PY) -m codespell_lib
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(SOURCES)

# The documentation site: pages of docs/ and the API reference, strictly, without a network. Open build/site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --clean --quiet

bench: .build/native
	$(PY) -m pytest bench --benchmark-enable --benchmark-only

# The sdist, and the wheel that is built from it, in dist/.
wheel: $(READY)
	$(PY) -m build --no-isolation

# The wheel in dist/ in an environment of its own, away from the checkout: every op equals its reference.
wheel-test:
	$(or $(PYTHON),python3) -m venv --clear .build/wheel
	.build/wheel/bin/python -m pip install --quiet $(filter torch==%,$(file <requirements.txt)) dist/*.whl
	cd .build/wheel && bin/python -m memkernels check --quick --backend cpu

# C++ kernels without torch or Python, under AddressSanitizer + UBSan and under ThreadSanitizer; then the operators,
# called with invalid arguments for half a minute (LONG=1: ten minutes, and every case).
sanitize: .build/native
	PYTHON=$(PY) LONG=$(LONG) tests/native/run

# MemoryStore through kills, power cuts, damage, refusals of the system and readers beside a writer: the long form of
# what the tests do, half an hour or more of two free cores. LAB holds options, such as LAB="power --seed 7".
crash-lab: .build/native
	PYTHONPATH=tests $(PY) -m crash --workers 2 --write bench/results/crash_lab.json $(LAB)

# The CUDA backend: builds and installs its library with nvcc, prints the resources of its kernels, runs them on the
# CPU. No GPU is needed. FAULTS=60 seeds one fault in sixty, as CI does.
cuda: $(READY)
	MEMKERNELS_CUDA=1 $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-build-isolation --no-deps -e .
	$(PY) -m bench.cuda_check
	MEMKERNELS_CUDA=1 MEMKERNELS_FAULTS=$(FAULTS) $(PYTEST) tests/test_simt.py tests/test_simt_*.py tests/test_cuda.py tests/test_gpu_check.py

# On a machine with a GPU, within minutes and without a network: build, proof and speed under the installed torch.
# CHECK holds options, such as CHECK="--out results --resume".
gpu-check:
	$(or $(PYTHON),python3) -m bench.gpu_check $(CHECK)

# A rehearsal of that check without a GPU: the CUDA build of torch, every launch down to a driver that records.
# REHEARSAL=--quick is what CI runs.
gpu-rehearsal: $(READY)
	$(PY) -m bench.gpu.rehearsal $(REHEARSAL)

clean:
	rm -rf build .build dist *.egg-info memkernels/_lib memkernels/_host*.so

.venv/.ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.build/given:
	@mkdir -p .build && touch $@

.build/native: $(READY) $(NATIVE)
	@mkdir -p .build
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-build-isolation --no-deps -e .
	@touch $@
