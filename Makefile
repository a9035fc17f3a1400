# `make demo` and `make test` do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types slow labs bench clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: gcompute needs Python 3.11 or newer; give one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## look, predict, train, serve, report: about 3 minutes on 2 cores
	$(BIN)/gcompute demo

test: $(STAMP)  ## the default tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(STAMP)  ## the slow tiers: the TPU and GPU compilers, the whole certificate, several processes, kill -9, labs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tpu-aot,gpu-aot]'
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(STAMP)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## against PyTorch, llama.cpp and transformers (installs the extra `peers`), and the textbook
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[peers]'
	$(BIN)/python benchmarks/train_vs_torch/run.py
	$(BIN)/python benchmarks/serve_vs_peers/run.py
	$(BIN)/python benchmarks/serve_vs_peers/over_http.py
	$(BIN)/python benchmarks/serve_kernels/run.py
	$(BIN)/python benchmarks/parallel/run.py

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) $(VENV)-* runs .pytest_cache .ruff_cache .hypothesis
