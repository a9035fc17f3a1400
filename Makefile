# `make demo` and `make test` do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pyenv has a python3.13 on the path for each version that it holds, which fails where that is not switched on.
ifeq ($(shell $(PYTHON) -c 'print("runs")' 2>/dev/null),)
  override PYTHON := $(or $(shell .ci/find_python $(PYTHON:python%=%) 2>/dev/null),$(PYTHON))
endif
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# The packages that the tests have passed with; `make test CONSTRAINTS=` takes the newest of everything.
CONSTRAINTS ?= constraints/python$(MINOR).txt
TESTED := $(wildcard $(CONSTRAINTS))
STAMP := $(VENV)/.installed-$(MINOR)$(if $(TESTED),,-newest)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  $(if $(TESTED),-c $(TESTED),--upgrade --upgrade-strategy eager)
# `make slow` runs all. CI runs what a commit calls for (tests/selection.py), without the compilers where no test asks.
CHOICE ?=
COMPILERS ?= tpu-aot,gpu-aot

.PHONY: install demo test oldest lint types slow lock bench clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml $(TESTED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: gcompute needs Python 3.11 or newer; give one with make PYTHON=python3.11"; exit 2; }
	@echo "installing into $(VENV): $(if $(TESTED),the tested set of $(TESTED),the newest of everything, \
	  for $(if $(CONSTRAINTS),there is no $(CONSTRAINTS),CONSTRAINTS is empty))"
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(MINOR)")' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e '.[dev]'
	@touch $(STAMP)

install: $(STAMP)  ## make the environment, with the tested set of packages (newest: make install CONSTRAINTS=)

demo: $(STAMP)  ## look, predict, train, serve, report: about 5 minutes, sized for the machine
	$(BIN)/gcompute demo

test: $(STAMP)  ## the default tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

oldest: $(STAMP)  ## each public function once
	$(BIN)/python -m pytest -m oldest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow: $(STAMP)  ## the slow tiers: the TPU and GPU compilers, the whole certificate, several processes, kill -9, labs
	$(if $(COMPILERS),$(PIP) -e '.[$(COMPILERS)]')
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(CHOICE)

lock:  ## write constraints/ anew: the newest packages for each Python that is here
	@for minor in 3.11 3.12 3.13; do \
	  if python=$$(.ci/find_python $$minor); then $$python constraints/lock.py || exit 1; fi; \
	done

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
