# The commands of the project; every one does its own set-up, and set-up that is done costs nothing.
#   make dev        .venv with everything, extensions built in place
#   make test       C++ and Python tests; needs no GPU
#   make demo       a real model, dense and sparse side by side
#   make test-gpu   the same Python tests with the GPU, fails without one; record in benchmarks/results/gpu_tests.json
#                   (PYTHON=python3 uses that interpreter, with the extension already built in place, and installs nothing)
#   make test-multi-gpu  tensor parallelism with two GPUs over NCCL; record in benchmarks/results/multi_gpu_tests.json
#   make sanitize   every kernel under compute-sanitizer's four tools, fails without a GPU; record in benchmarks/results/sanitize.json
#   make check      formatting, linting, types, layering      make fmt   formats      make clean   removes what was built
# SPARSE_MARLIN_CPU_ONLY=1 leaves out CUDA; TORCH_CUDA_ARCH_LIST and MAX_JOBS as in setup.py; PYTEST_ARGS goes to pytest.

SHELL := /bin/bash
# OpenMP threads that sleep while they wait. Spinning, the default, saves microseconds on an idle machine, but where other programs
# want the same cores every parallel region can cost a scheduler's time slice: a demo of 1 minute then takes 5.
export OMP_WAIT_POLICY ?= passive
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
CLANG_FORMAT ?= clang-format
JOBS ?= $(or $(MAX_JOBS),$(shell nproc 2>/dev/null || echo 2))
PYTEST_ARGS ?=

CXX_FILES := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
EXTENSION_FILES := setup.py python/sparse_marlin/_version.py $(filter csrc/%,$(CXX_FILES))

# Stamps. A build without CUDA and one with it are different builds.
DEPS := $(VENV)/.deps
BUILT := build/.built$(if $(filter-out 0,$(SPARSE_MARLIN_CPU_ONLY)),-cpu-only)
INSTALLED := $(VENV)/.installed
CPP_TESTS := build/cpp/sparse_marlin_cpp_tests

.PHONY: help dev test test-cpp test-py test-gpu test-multi-gpu sanitize demo check fmt clean

help:
	@sed -n '2,10s/^# *//p' Makefile

# Python >= 3.10 that can create environments and compile extensions; the first found.
$(PY):
	@base="$(PYTHON)"; \
	for candidate in $$base python3.12 python3.13 python3.11 python3.10 python3.14 python3; do \
	  command -v $$candidate >/dev/null 2>&1 || continue; \
	  $$candidate -c 'import sys, venv, ensurepip, sysconfig, os; ok = sys.version_info >= (3, 10) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")); sys.exit(not ok)' 2>/dev/null || continue; \
	  echo "environment: $(VENV) with $$($$candidate --version)"; \
	  $$candidate -m venv $(VENV) && exit 0; \
	done; \
	echo "make: python: expected Python 3.10 or newer with venv and headers, found none;" \
	     "install it, on Debian and Ubuntu: apt-get install python3 python3-venv python3-dev" >&2; exit 1

$(DEPS): pyproject.toml tools/requirements.py | $(PY)
	$(PY) tools/requirements.py build dev demo > $(VENV)/requirements.txt
	$(PY) -m pip install --disable-pip-version-check --quiet -r $(VENV)/requirements.txt
	@touch $@

$(BUILT): $(DEPS) $(EXTENSION_FILES)
	@command -v g++ >/dev/null || { echo "make: g++: not found; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@mkdir -p build && rm -f build/.built*
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Only links the folder and the command in: pip finds the objects that are there already and compiles nothing.
$(INSTALLED): $(BUILT) pyproject.toml README.md
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@touch $@

dev: $(BUILT) $(INSTALLED)

test: test-cpp test-py

test-cpp: $(CPP_TESTS)
	ctest --test-dir build/cpp --output-on-failure

.PHONY: $(CPP_TESTS)
$(CPP_TESTS):
	@tools/need.sh cmake cmake
	@tools/need.sh /usr/include/gtest/gtest.h libgtest-dev
	cmake -S tests/cpp -B build/cpp >/dev/null
	cmake --build build/cpp -j $(JOBS)

test-py: dev
	$(PY) -m pytest $(PYTEST_ARGS)

ifeq ($(origin PYTHON),command line)
test-gpu:
	PYTHONPATH=python $(PYTHON) tools/test_gpu.py $(PYTEST_ARGS)

test-multi-gpu:
	PYTHONPATH=python $(PYTHON) tools/test_multi_gpu.py $(PYTEST_ARGS)

sanitize:
	PYTHONPATH=python $(PYTHON) tools/sanitize.py
else
test-gpu: dev
	$(PY) tools/test_gpu.py $(PYTEST_ARGS)

test-multi-gpu: dev
	$(PY) tools/test_multi_gpu.py $(PYTEST_ARGS)

sanitize: dev
	$(PY) tools/sanitize.py
endif

demo: dev
	$(VENV)/bin/sparse-marlin demo

check: $(DEPS) $(BUILT)
	@tools/need.sh $(CLANG_FORMAT) clang-format
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_layering.py

fmt: $(DEPS)
	$(CLANG_FORMAT) -i $(CXX_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf build python/*.egg-info $(INSTALLED) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f python/sparse_marlin/*.so
	find python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
