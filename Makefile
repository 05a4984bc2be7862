# make lbt    set up .venv, then search an architecture with Learning by Teaching
# make test   set up .venv, then run the checks and the tests (ARGS: more options of pytest)
# make test-slow   run the tests that `make test` leaves out: the rest of large matrices
# make test-oldest   run the tests on the oldest torch that pyproject.toml allows, in .venv-oldest
# make lint   the checks alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder
OLDEST := .venv-oldest
OLDEST_TORCH = $(shell sed -n 's/^ *"\(torch[a-z]*\)>=\([0-9.]*\)",/\1==\2/p' pyproject.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help lbt test test-slow test-oldest lint

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

lbt: $(VENV)/.installed
	@$(BIN)/mlo run lbt $(ARGS)

test: lint
	@echo "== tests"
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	@echo "== slow tests"
	@$(PYTEST) -m slow $(ARGS)

test-oldest: $(OLDEST)/.installed-oldest
	@echo "== tests on $(OLDEST_TORCH)"
	@$(PYTEST:$(BIN)/%=$(OLDEST)/bin/%) -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	@echo "== ruff" && $(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@echo "== mypy" && $(BIN)/mypy --no-error-summary
	@echo "== import layers" && $(BIN)/lint-imports --no-logo >$(VENV)/layers.log || { cat $(VENV)/layers.log; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing mlo and what it needs into $(VENV) (PyTorch is large: minutes, the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[lbt]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing mlo, what it needs and the tools for development into $(VENV) (PyTorch is large: minutes, the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(OLDEST)/.installed-oldest: pyproject.toml
	@$(MAKE) --silent --no-print-directory VENV=$(OLDEST) $(OLDEST)/bin/pip
	@echo "Installing mlo, the tools for development and $(OLDEST_TORCH) into $(OLDEST) (minutes, the first time)"
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' $(OLDEST_TORCH)
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: mlo needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
