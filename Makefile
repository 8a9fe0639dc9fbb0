# Two commands to know: `make demo` and `make test`. `make venv` builds just the environment both use.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: help venv demo test test-all test-mutations test-pythons test-extras lint bench clean

help:
	@echo "make demo      raw text -> trained, resumed, evaluated, exported model on this machine's CPU (minutes)"
	@echo "make test      lint, types and all quick tests"
	@echo "make test-all  the long matrices and the mutations too"
	@echo "make test-pythons  make test on every Python from 3.11 on that is installed (PYTHONS='3.12 3.13': on these)"
	@echo "make test-extras   the tests that need more than .venv has: datatrove, spaCy, ray, strace, network namespaces"
	@echo "make test-mutations  puts in faults that other engines had, one at a time, and sees each caught"
	@echo "make venv      only .venv with everything pinned in constraints.txt and the C++ extension built"
	@echo "make bench     the engine beside its peers and the limits of this machine: one table, bench.json (BENCH=--quick: minutes)"

venv: .venv/ready

.venv/ready: constraints.txt pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel pybind11 torch
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/python examples/quickstart/demo.py

test: venv lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not heavy"

test-all: venv lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m tests.proofs.mutations

test-mutations: venv
	$(BIN)/python -m tests.proofs.mutations

test-pythons:
	PIP_ARGS="$(PIP_ARGS)" $(PYTHON) tools/pythons.py $(PYTHONS)

# Where `make test` skips tests for want of something optional. What is missing still is told at the end.
EXTRA_TESTS ?= $(addprefix tests/,data/clean checkpoint/test_kill.py distributed/test_multinode.py data/prepare/test_disk.py csrc/test_cuda_binding.py ops/test_fp8.py)

test-extras: build/extras/ready
	@for tool in strace ip setpriv unshare sinfo; do command -v $$tool > /dev/null || echo "not installed: $$tool (apt-get install strace iproute2 util-linux slurm-wlm)"; done
	build/extras/bin/python -m pytest -n 2 --dist worksteal -m "not heavy" $(EXTRA_TESTS)

build/extras/ready: constraints.txt pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv build/extras
	build/extras/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel pybind11 torch
	build/extras/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev,clean,chinese,ray]'
	@touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

bench: venv
	$(BIN)/python tools/bench/all.py $(BENCH)

clean:
	rm -rf .venv build demo *.egg-info engine/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
