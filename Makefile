# `make install` sets up .venv; `make test` also installs what the tests need, and runs them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test

install: .venv/installed

.venv/installed: requirements.txt
	@echo "installing requirements.txt into .venv (some minutes, about 6 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q ruff pytest
	touch $@

test: .venv/installed-test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
