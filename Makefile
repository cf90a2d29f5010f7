# From a bare machine with python3 and make: everything is installed into .venv, once.
#
#   make mnist ARGS="--penalty both --epochs 5"     flags of the recipe, instead of --penalty param
#   make test PYTEST_ARGS="-k spectral -x"          arguments of pytest, passed on
#   make test PYTHON=python3.12                     another interpreter, for a .venv that is not there yet

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PYTEST_ARGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
SETUP := $(VENV)/.setup
BENCH_SETUP := $(VENV)/.bench

.DEFAULT_GOAL := help
.PHONY: help setup mnist cifar compare-quick test test-gpu test-oldest thorough lint format docs bench bench-quick clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | awk -F: '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(SETUP)  ## install gradpen and what it needs into .venv (about two minutes, once)

mnist: ARGS ?= --penalty param
mnist: $(SETUP)  ## train an MLP on MNIST under the parameter penalty; other flags in ARGS="..."
	$(BIN)/python recipes/mnist.py $(ARGS)

cifar: $(SETUP)  ## train the CIFAR recipe; its flags in ARGS="..."
	$(BIN)/python recipes/cifar.py $(ARGS)

compare-quick: $(SETUP)  ## a small comparison with every figure, on embedded images
	$(BIN)/python recipes/compare.py --grid recipes/grids/quick.yaml --jobs 2 $(ARGS)

test: lint  ## lint, types and tests, as CI does
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(SETUP)  ## what a CUDA device is needed for, and the tests of all that computes with their tensors on it
	$(BIN)/python -m pytest -m gpu tests $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "not gpu" --device cuda tests $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.setup  ## the tests with the oldest versions that pyproject.toml allows, on Python 3.10 or 3.11
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS)

thorough: $(SETUP)  ## the properties on new random networks, 1,000 for the inequality in each precision, with statistics
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/test_properties.py --hypothesis-show-statistics

lint: $(SETUP)  ## style, docstrings, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(SETUP)  ## build the documentation; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(BENCH_SETUP)  ## tables of costs beside the peers'
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-quick: $(BENCH_SETUP)  ## the same, smaller
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

clean:  ## remove both .venv, caches and built pages; data/ and runs/ stay
	rm -rf $(VENV) $(OLDEST) docs/_build build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find gradpen tests recipes benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(SETUP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV): this takes about two minutes, once."
	$(PIP) --editable ".[recipes,dev,docs]"
	@# On every core, while pip would use one; files of packages that are not for this Python are left out.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

$(OLDEST)/.setup: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[recipes,dev]"
	@touch $@

$(BENCH_SETUP): $(SETUP)
	$(PIP) --editable ".[bench]"
	@touch $@
