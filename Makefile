# Development commands. Each starts from nothing: a clean checkout, Python 3.10 or newer, a C++ compiler.
#
#   make demo      train a small network on real data, stock and enabled, and compare
#   make test      lint, types, and all tests but the slow ones, with the native kernels built
#   make test-reference   the same tests without the kernels, on the plain-PyTorch reference alone
#   make bench     measure against stock on this machine          (BENCH_ARGS="...")
#   make docs      build the documentation, warnings are errors
#   make doctest   run the examples in docstrings and documents
#   make asan      the kernel tests under the address sanitizer
#   make races     the CUDA kernels on the emulated device, each access held against those of other threads
#   make gpu-test  the CUDA kernels on this machine's GPU; uses $(PYTHON) and what it has, makes no environment
#   make gpu-kernels gpu-compile gpu-models gpu-memcheck gpu-racecheck   its pieces, each for itself
#   make gpu-bench measure on this machine's GPU, in the same way (BENCH_ARGS="...")
#   make format    format Python and C++
#   make clean     remove what the above made, .venv included

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INPUTS := pyproject.toml setup.py requirements-ci.txt
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-reference demo bench docs doctest asan races gpu-test gpu-bench format format-check clean
.PHONY: gpu-build gpu-kernels gpu-compile gpu-models gpu-memcheck gpu-racecheck

help:
	@sed -n 's/^#  *\(make .*\)/  \1/p' Makefile

# --- environments: stamps keep them from being made again ------------------------------------------------------------

$(VENV)/.stamp-torch: requirements-ci.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON): expected Python 3.10 or newer, got `$(PYTHON) --version`; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c requirements-ci.txt setuptools torch
	@touch $@

# --no-build-isolation: the editable install needs nothing but the setuptools just installed.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml setup.py
	$(PIP) -c requirements-ci.txt --no-build-isolation -e '.[demo]'
	@touch $@

# Norse is published as source alone, and without isolation it is built with what is here.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml setup.py
	$(PIP) -c requirements-ci.txt setuptools_scm
	$(PIP) -c requirements-ci.txt --no-build-isolation -e '.[test,snntorch,norse,demo,dev]'
	@touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	$(PIP) -c requirements-ci.txt --no-build-isolation -e '.[docs]'
	@touch $@

venv: $(VENV)/.stamp-dev

# --- checks ----------------------------------------------------------------------------------------------------------

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, and in each a single thread but where a test asks for more.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

test: venv lint
	SPARSE_BACKEND_BUILD=cpu $(TEST) $(PYTEST_ARGS)

test-reference: venv
	SPARSE_BACKEND_BUILD=none $(TEST) $(PYTEST_ARGS)

# fused_triton.py needs Triton, which comes with torch for GPUs alone.
doctest: venv
	$(BIN)/python -m pytest --ignore=sparse_backend/bench/fused_triton.py --doctest-modules --doctest-glob='*.md' --doctest-continue-on-failure \
	  sparse_backend README.md docs $(PYTEST_ARGS)

# torch itself is not instrumented, so the sanitizer is preloaded; libstdc++ with it, or the first C++ exception aborts.
# Leak detection is off: the interpreter and torch free nothing at exit.
# pytest must not swallow the report: no capture of the file descriptor, no fault handler instead of the sanitizer's.
asan: venv
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 SPARSE_BACKEND_SANITIZE=address SPARSE_BACKEND_DEBUG=1 SPARSE_BACKEND_BUILD=cpu \
	  $(BIN)/python -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys -m "kernels and not slow" $(PYTEST_ARGS)

# Without the layers of 1000 neurons, which take as long as everything else together.
races: venv
	EMULATION_CHECKS_RACES=1 SPARSE_BACKEND_BUILD=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
	  tests/test_cuda_kernels.py tests/test_cuda_lif_kernels.py tests/test_cuda_half_ops.py -k "not 1000" $(PYTEST_ARGS)

# Needs a GPU, a CUDA build of torch, nvcc, ninja, pytest and hypothesis in $(PYTHON): often that of a container. Under
# the sanitizer every tensor is an allocation of its own, so that a step outside one is seen; hypothesis draws the same
# cases there, of which a kernel that errs fails the first.
GPU := CUBLAS_WORKSPACE_CONFIG=:4096:8 SPARSE_BACKEND_BUILD=cuda PYTHONPATH=$(CURDIR)
GPU_PYTEST := $(PYTHON) -m pytest -p no:cacheprovider
SANITIZER := compute-sanitizer --error-exitcode 3 --launch-timeout 0 --report-api-errors no
gpu-test: gpu-kernels gpu-compile gpu-models gpu-memcheck gpu-racecheck

gpu-build:
	$(GPU) $(PYTHON) -m sparse_backend doctor --build

gpu-kernels: gpu-build
	$(GPU) $(GPU_PYTEST) tests/test_cuda_device*.py $(PYTEST_ARGS)

gpu-compile:
	$(GPU) $(GPU_PYTEST) tests/test_cuda_compile.py tests/test_cuda_build.py $(PYTEST_ARGS)

gpu-models: gpu-build
	@if ! $(PYTHON) -c 'import snntorch, norse' 2>/dev/null; then \
	  echo "SKIPPED: whole models against the stock frameworks, snnTorch and Norse are not installed"; \
	else $(GPU):tests $(GPU_PYTEST) -q -p emulation.gpu_everywhere tests/test_functional.py \
	  tests/test_lif_functional.py tests/test_snntorch_equality.py tests/test_norse_equality.py $(PYTEST_ARGS); fi

gpu-memcheck gpu-racecheck: gpu-%: gpu-build
	@if ! command -v compute-sanitizer >/dev/null; then \
	  echo "SKIPPED: compute-sanitizer is not on this machine; the CUDA toolkit has it"; \
	else echo "compute-sanitizer --tool $*"; \
	  $(GPU) PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $* \
	    $(GPU_PYTEST) -q tests/test_cuda_device_*ops.py -k "twin or events or ties or finite" $(PYTEST_ARGS); \
	fi

gpu-bench: gpu-build
	SPARSE_BACKEND_BUILD=cuda PYTHONPATH=$(CURDIR) $(PYTHON) -m sparse_backend bench --device cuda $(BENCH_ARGS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

format-check: venv
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

# --- what users see --------------------------------------------------------------------------------------------------

demo: $(VENV)/.stamp-demo
	$(BIN)/python -m sparse_backend demo $(DEMO_ARGS)

bench: venv
	$(BIN)/python -m sparse_backend bench $(BENCH_ARGS)

docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sparse_backend adapters tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
