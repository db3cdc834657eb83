# `make demo` and `make test` are the two commands to know. Every target sets up what it needs in
# .venv, once; a stamp there remembers it until pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN = $(VENV)/bin
CONSTRAINTS := constraints.txt
# The oldest supported versions, in an environment beside the other; of the tests, those that depend on them.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/attention tests/decoding tests/models tests/speed tests/weights tests/test_policy.py \
	tests/test_store.py
# The package's own build needs no isolated environment: setuptools is in .venv, at a pinned version.
INSTALL = $(BIN)/python -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS)
EDITABLE = $(INSTALL) --no-build-isolation --editable
LINT_IMPORTS := from importlinter.cli import lint_imports_command as lint; lint()
SOURCES = $(shell find arkv policies models -name __pycache__ -prune -o -print)

.PHONY: help demo test test-oldest lint docs results bench gpu gpu-dry format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.stamp-base ## Draw eight prompts under four policies into demo.png, with a table
	$(BIN)/arkv demo --out demo.png $(ARGS)

test: $(VENV)/.stamp-test ## Run the tests, a process a core; ARGS="-k name" is handed to pytest
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-oldest: $(OLDEST)/.stamp ## Run what depends on versions under the oldest supported ones
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal $(OLDEST_TESTS) $(ARGS)

lint: $(VENV)/.stamp-dev build/layout/.stamp ## Check style, format, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/layout && ../../$(BIN)/python -c '$(LINT_IMPORTS)' --no-logo --no-cache ../../pyproject.toml
	$(BIN)/mypy | sed -E 's#^build/layout/arkv/(policies|models)/#\1/#; s#^build/layout/##'

format: $(VENV)/.stamp-dev ## Mend style and format where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs build/layout/.stamp ## Build the site into site/, any warning an error
	$(BIN)/python docs/assets/draw_cache.py --check
	$(BIN)/python docs/results --check
	$(BIN)/python docs/assets/draw_window.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: $(VENV)/.stamp-docs ## Print tables and plots of docs/results from their rows, and say which rows are old
	$(BIN)/python docs/results $(ARGS)

bench: $(VENV)/.stamp-base ## Print tokens/s and KV bytes by policy and batch on this machine
	$(BIN)/arkv bench --model scenes $(ARGS)

gpu: ## Measure on this machine's GPU and write docs/results/gpu.md; STEP=3 for one step; installs nothing
	$(PYTHON) docs/results/gpu $(if $(STEP),--step $(STEP)) $(ARGS)

gpu-dry: $(VENV)/.stamp-test ## Run all that `make gpu` runs, on the CPU with tiny models; STEP=3 for one step
	rm -rf runs/gpu-dry
	$(BIN)/python docs/results/gpu --dry $(if $(STEP),--step $(STEP)) $(ARGS)

clean: ## Remove what builds and checks leave; .venv stays
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find arkv policies models tests docs -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "arkv needs Python 3.10 or newer and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by its pin: a looser requirement might be answered with another build of it.
$(VENV)/.stamp-base: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) "$$(grep '^torch==' constraints.txt)" setuptools wheel
	$(EDITABLE) .
	@touch $@

$(VENV)/.stamp-test $(VENV)/.stamp-dev $(VENV)/.stamp-docs: $(VENV)/.stamp-%: $(VENV)/.stamp-base
	$(EDITABLE) '.[$*]' --quiet
	@touch $@

# torch first here too: where a machine prefers builds for the CPU, this version is still the one for CUDA.
$(OLDEST)/.stamp: VENV := $(OLDEST)
$(OLDEST)/.stamp: CONSTRAINTS := constraints-oldest.txt
$(OLDEST)/.stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools wheel
	$(EDITABLE) '.[parquet,viz]' hypothesis pytest pytest-xdist triton
	@touch $@

# The package laid out as it will be installed, for tools that read files instead of importing them.
build/layout/.stamp: pyproject.toml setup.py $(SOURCES) | $(VENV)/.stamp-base
	@rm -rf build/layout
	@$(BIN)/python setup.py --quiet build_py --build-lib build/layout
	@touch $@
