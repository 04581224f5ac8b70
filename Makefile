# `make quickstart` and `make test` need nothing but Python >= 3.11 and make; both are safe to run again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow survival lint clean

quickstart: .venv/.installed
	$(BIN)/ssl-vit quickstart

test: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not survival"

survival: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/survival

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -q -m slow

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssl-vit needs Python >= 3.11, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | $(BIN)/python
	@echo "installing into .venv: a few minutes, and several GB where pip brings torch's CUDA build"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing into .venv: a few minutes, and several GB where pip brings torch's CUDA build"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch .venv/.installed $@

clean:
	rm -rf .venv runs
