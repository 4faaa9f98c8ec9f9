# Every target sets up what it needs in .venv, on a machine that has python3.11 or newer and pip.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: mnist test lint clean

mnist: $(VENV)/installed  ## the paper's Figure 1 on this machine, with verdicts
	$(BIN)/batchnorm reproduce mnist $(ARGS)

test: $(VENV)/installed-dev  ## every test
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/installed-dev  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "batchnorm needs Python 3.11 or newer; none was found. Try: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV): PyTorch is large, this may take some minutes"
	$(PIP_INSTALL) --editable '.[plots]'
	@touch $@

$(VENV)/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV): PyTorch is large, this may take some minutes"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
