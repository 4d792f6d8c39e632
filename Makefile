# `make help` lists the targets. Each one prepares .venv first when that is missing or out of date.
#
#   PYTHON       interpreter that creates .venv
#   TORCH_INDEX  package index to take torch from; set it to the CPU index that pytorch.org names
#                if the default one would bring gigabytes of CUDA packages
#   ARGS         more arguments for the command: make test ARGS="-k partition"
#   RUNS         inputs that `make fuzz` tries

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
RUNS ?= 10000000

BIN := .venv/bin
STAMP := .venv/.stamp
ENGINE := .venv/.engine
NATIVE := $(MAKE) --no-print-directory -C csrc
JOBS := -j$(shell nproc 2>/dev/null || echo 2)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-native test-sanitize test-arm fuzz lint bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(ENGINE)  ## train and serve a real model over the devices of an emulated home
	@$(BIN)/dora demo $(ARGS)

test: $(ENGINE) test-native  ## run the tests, without the slow ones and those that need a GPU
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(ENGINE) test-native  ## run every test that this machine can run
	@if $(NATIVE) VARIANT=asan check && $(NATIVE) VARIANT=tsan check; \
	then $(MAKE) --no-print-directory test-sanitize; else echo "Skipped: test-sanitize"; fi
	@$(BIN)/python -m pytest -m "" $(ARGS)

test-native:  ## run the C++ tests of the engine
	@$(NATIVE) $(JOBS) run

test-sanitize:  ## run the C++ tests with address, undefined behaviour and thread sanitizers
	@$(NATIVE) $(JOBS) VARIANT=asan run
	@$(NATIVE) $(JOBS) VARIANT=tsan run

test-arm:  ## run the C++ tests for 64-bit ARM, under qemu
	@$(NATIVE) $(JOBS) VARIANT=arm run

fuzz:  ## feed the engine's parsers RUNS random inputs
	@$(NATIVE) $(JOBS) VARIANT=fuzz RUNS=$(RUNS) fuzz

lint: $(STAMP)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy dora

bench: $(ENGINE)  ## compare with torch.distributed.pipelining, gloo and raw TCP, quickly
	@$(BIN)/python benchmarks/bench_pipeline.py --quick $(ARGS)
	@$(BIN)/python benchmarks/bench_comm.py --quick $(ARGS)

clean:  ## remove .venv, caches and build results
	@rm -rf .venv build dist *.egg-info dora/_C.*.so
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Python's own header, which Debian packages apart.
HAS_HEADERS := import os, sys, sysconfig; \
  path = os.path.join(sysconfig.get_path("include"), "Python.h"); \
  sys.exit(None if os.path.exists(path) else f"{path} is missing. On Debian: apt install python3-dev")

# torch goes first and alone, so that TORCH_INDEX applies to it and to nothing else; its
# dependencies come with the package's own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make needs Python 3.11 or newer for the versions in constraints.txt; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	@$(NATIVE) check
	@$(PYTHON) -c '$(HAS_HEADERS)'
	@echo "Preparing .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@echo "  1/3 build tools"
	@$(PIP) setuptools wheel pybind11 ninja
	@echo "  2/3 torch"
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "  3/3 dora and its test tools"
	@rm -rf build/temp.*  # objects of another pybind11
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "Ready: $(BIN)/dora"

# Only what changed compiles again; what `pip install` has just built is up to date.
$(ENGINE): $(STAMP) setup.py $(wildcard csrc/*.cpp csrc/*.h)
	@$(NATIVE) check
	@echo "Building the engine"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
