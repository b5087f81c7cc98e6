# Two commands do everything: `make demo` and `make test`. Each sets up .venv by itself the first time.
#
#   make demo        distil a small vision-language student on this machine (no GPU needed)
#   make test        lint, types and all tests that this machine can run
#   make bench       measure the kernels against plain torch, TRL and Liger; write docs/benchmarks.md
#   make study       compare splits, gammas and guards over seeds; hours, resumable; write docs/study.md
#   make docs        build the documentation into site/; a warning is an error
#   make wheel       one wheel of the CPU kernels for this architecture, in dist/; CUDA=1 adds the CUDA kernels
#   make test-floor  the kernels' tests on the oldest torch that is supported, in .venv-floor; no other packages
#   make test-integrations   ms-swift and verl, each installed for it in a temporary folder; minutes, about 2 GiB
#   make gpu-check   on a machine with a GPU, under 30 minutes: is it right, and how near to its roofline
#   make lint        what pre-commit runs
#   make format      rewrite the sources in the house format
#   make clean       remove builds and caches, keep .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
NATIVE_SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test bench study docs wheel test-floor test-integrations gpu-check lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   \(make\)/\1/p' Makefile

# torch comes first: the extension is built against the one that is installed (--no-build-isolation).
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet torch torchvision
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo,bench,docs,dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/vgs demo $(ARGS)

# A process a core, one thread each: whole files stay together, for what their tests share.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/vgs bench $(ARGS)

study: $(VENV)/.dev
	$(BIN)/python -m benchmarks.study $(ARGS)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(VENV)/.torch
	$(if $(CUDA),FORCE_CUDA=1,FORCE_ONLY_CPU=1) $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# From the source tree, without an installation; what needs another package is skipped and says so. The interpreter of
# Triton 3.6 takes arrays of one entry for numbers, which later numpys do not.
$(FLOOR)/.torch:
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet torch==2.11.0 'numpy<2.4' pytest setuptools wheel ninja
	touch $@

test-floor: $(FLOOR)/.torch
	$(FLOOR)/bin/python setup.py build_ext --inplace
	PYTHONPATH=. $(FLOOR)/bin/python -m pytest tests/test_*.py $(ARGS)

test-integrations: $(VENV)/.dev
	VGS_TEST_INTEGRATIONS=1 $(BIN)/python -m pytest -rs tests/integrations -p no:xdist $(ARGS)

gpu-check: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist site *.egg-info vgs_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
