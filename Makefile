# make demo    set up, train a small adapter, trace it in PEFT and vLLM, check its merge
# make test    set up, run the tests
# make test-wide  the same faults and layers with more runners, workers and models
# make test-browser  the pages in Chromium, which has to be installed
# make test-fast  the tests without engines and training, in under a minute
# make mutants    break each rule and each judgement on purpose: the fast tests must fail
# make matrix     the plugin's engine tests with vLLM 0.30, 0.31 and 0.32, on both model runners
# make check   lint, types, import layers
# make bench   measure throughput with and without adapter and probe, and the hot paths, into BENCH.json
# make rules   write lora_probe/rules/RULES.md from the rules' docstrings
# Needs Linux on x86-64 and CPython 3.11, 3.12 or 3.13; on macOS and Windows use a Linux container.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

# The first one that runs and is suitable is used; `make PYTHON=...` selects another. A name in PATH may be a broken shim.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
SUITABLE := import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13) and sys.implementation.name == "cpython"))
VENV := .venv
BIN := $(VENV)/bin
# Two processes, each with whole files of tests: fixtures of a file and a session are made once in each.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
digest = $(shell cat $(1) | sha256sum | cut -c1-16)
LOCKED := $(VENV)/.lock-$(call digest,requirements.lock)
READY := $(VENV)/.ready-$(call digest,requirements.lock setup.cfg pyproject.toml plugins/vllm/setup.cfg plugins/vllm/pyproject.toml)

.PHONY: help setup demo test test-wide test-browser test-fast mutants matrix check bench rules clean

help:
	@sed -n '1,11s/^# //p' Makefile

setup: $(READY)

$(LOCKED):
	@for python in $(PYTHONS); do \
		if "$$python" -c '$(SUITABLE)' 2>/dev/null; then exec "$$python" .ci/set_up.py $(VENV) requirements.lock; fi; \
	done; \
	echo 'error: no CPython 3.11, 3.12 or 3.13 found (tried $(PYTHONS)); install one, or run make PYTHON=/path/to/python' >&2; exit 1
	@touch $@

$(READY): $(LOCKED)
	@rm -rf *.egg-info plugins/vllm/*.egg-info
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e . -e plugins/vllm
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/identity/demo.py

test: $(READY)
	@$(BIN)/python -m pytest -m "not wide and not browser" $(PARALLEL)

test-wide: $(READY)
	@$(BIN)/python -m pytest -m wide $(PARALLEL)

test-browser: $(READY)
	@$(BIN)/python -m pytest -m browser

test-fast: $(READY)
	@$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

mutants: $(READY)
	@$(BIN)/python tests/mutants.py

matrix: $(READY)
	@$(BIN)/python tests/matrix.py

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only -q --benchmark-json BENCH.json

rules: $(READY)
	@$(BIN)/lora-probe rule --all --format markdown > lora_probe/rules/RULES.md.new
	@mv lora_probe/rules/RULES.md.new lora_probe/rules/RULES.md

clean:
	rm -rf $(VENV) .matrix examples/identity/out build plugins/vllm/build *.egg-info plugins/vllm/*.egg-info
