# Start with `make demo` and `make test`; both use the environment of `make venv`.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: help venv demo test quick test-all test-mutations test-pythons test-torch test-extras lint bench clean

help:
	@echo "make demo      raw text to a trained, resumed, evaluated and exported model on the CPU (minutes)"
	@echo "make test      check style and types, run all quick tests"
	@echo "make test-all  also run the long test matrices and the mutations"
	@echo "make test-pythons  make test with every installed Python from 3.11 on (PYTHONS='3.12 3.13': only these)"
	@echo "make test-torch    run the quick tests with the oldest torch that pyproject.toml allows"
	@echo "make test-extras   run the tests that need more than .venv: datatrove, spaCy, ray, strace, network namespaces"
	@echo "make test-mutations  insert bugs that other engines had, one at a time, and check that a test fails"
	@echo "make lint      check style and types only"
	@echo "make venv      create .venv with the versions of constraints.txt and build the C++ extensions"
	@echo "make bench     compare the engine with other engines and this machine's limits (BENCH=--quick: minutes)"

venv: .venv/ready

SOURCES := constraints.txt pyproject.toml setup.py $(shell find csrc -type f)
PIP = bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

# The environment of a target FOLDER/ready, with EXTRAS.
define environment
	$(PYTHON) -m venv $(@D)
	$(@D)/$(PIP) setuptools wheel pybind11 torch
	$(@D)/$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
endef

.venv/ready: EXTRAS = dev
.venv/ready: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(environment)

demo: venv
	$(BIN)/python examples/quickstart/demo.py

test: venv lint quick

quick: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not heavy"

test-all: venv lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m tests.proofs.mutations

test-mutations: venv
	$(BIN)/python -m tests.proofs.mutations

test-pythons:
	PIP_ARGS="$(PIP_ARGS)" $(PYTHON) tools/pythons.py $(PYTHONS)

test-torch:
	PIP_ARGS="$(PIP_ARGS)" $(PYTHON) tools/pythons.py --oldest-torch

# Test files where `make test` skips tests that need optional packages. Skipped tests are listed at the end.
EXTRA_TESTS ?= $(addprefix tests/,data/clean checkpoint/test_kill.py distributed/test_multinode.py data/prepare/test_disk.py csrc/test_cuda_binding.py ops/test_fp8.py)

test-extras: build/extras/ready
	@for tool in strace ip setpriv unshare sinfo; do command -v $$tool > /dev/null || echo "not installed: $$tool (apt-get install strace iproute2 util-linux slurm-wlm)"; done
	build/extras/bin/python -m pytest -n 2 --dist worksteal -m "not heavy" $(EXTRA_TESTS)

build/extras/ready: EXTRAS = dev,clean,chinese,ray
build/extras/ready: $(SOURCES)
	$(environment)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

bench: venv
	$(BIN)/python tools/bench/all.py $(BENCH)

clean:
	rm -rf .venv build demo *.egg-info engine/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
