# Everything runs in .venv, which each target makes or updates by itself.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# The CPU build: asking for plain "torch" may fetch gigabytes of CUDA packages.
TORCH ?= torch==2.13.0

.PHONY: help demo test test-long fast check format clean gpu-check gpu-check-kit

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps tensorrt-stubs
	$(BIN)/python tools/fix_tensorrt_stubs.py
	@touch $(STAMP)

demo: $(STAMP)  ## Walk the whole way on the shipped model: analyze, export, generate, compare
	$(BIN)/forcingkv demo

# Workers and the processes that tests start would each compile every module, where bytecode is not kept.
test: $(STAMP)  ## Run all tests but the longest, in at most 8 minutes
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal -m 'not long'

test-long: $(STAMP)  ## Run the longest tests, and more sizes, GPUs and kills of what make test has one of
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal -m long

fast: $(STAMP)  ## Run the tests that take milliseconds
	$(BIN)/python -m pytest -m 'not slow'

check: $(STAMP)  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: $(STAMP)  ## Try everything that needs a GPU, in at most 8 minutes; on a CPU with stand-ins
	$(BIN)/python -m tools.gpu_check

gpu-check-kit: $(STAMP)  ## Make, on a CPU, what gpu-check can take with it
	$(BIN)/python -m tools.gpu_check.make_kit

format: $(STAMP)  ## Fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was made here
	rm -rf .venv build dist demo-out runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
