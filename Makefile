# `make help` lists the targets. Each one prepares .venv first when that is missing or out of date.
#
#   PYTHON       interpreter that creates .venv
#   TORCH_INDEX  package index to take torch from; set it to the CPU index that pytorch.org names
#                if the default one would bring gigabytes of CUDA packages
#   ARGS         more arguments for the command: make test ARGS="-k partition"

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.stamp
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## train and serve a real model over several processes on this machine
	@$(BIN)/dora demo $(ARGS)

test: $(STAMP)  ## run the tests, without the slow ones and those that need a GPU
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(STAMP)  ## run every test that this machine can run
	@$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(STAMP)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy dora

bench: $(STAMP)  ## compare step time and memory with torch.distributed.pipelining
	@$(BIN)/python benchmarks/bench_pipeline.py --quick $(ARGS)

clean:  ## remove .venv, caches and build results
	@rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that TORCH_INDEX applies to it and to nothing else; its
# dependencies come with the package's own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make needs Python 3.11 or newer for the versions in constraints.txt; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	@echo "Preparing .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@echo "  1/3 build tools"
	@$(PIP) setuptools wheel
	@echo "  2/3 torch"
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "  3/3 dora and its test tools"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "Ready: $(BIN)/dora"
