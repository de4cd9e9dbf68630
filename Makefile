# Everything runs from a fresh clone with Python >= 3.11, pip, git and make.
#   make PIP_ARGS="..."   passes more arguments to pip, such as an index of CPU-only torch wheels

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
JOBS ?= 2
CASES ?= 3000
DEPLOY ?=
SEED ?= $(shell date +%s)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet $(PIP_ARGS)
# One thread per test worker: two workers with all threads each are slower than with one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10

.DEFAULT_GOAL := help
.PHONY: help setup test slow fuzz mutants zoo deploy large lint types demo readme build bench batteries clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## install attnopt and its tools in .venv

# torch comes first and alone, so that nothing else chooses its build. A Python without ensurepip
# makes an environment without pip, and its own pip fills it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "attnopt needs Python 3.11 or newer" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP)  ## run the fast tests
	$(PYTEST) -q -n $(JOBS) --dist worksteal -m "not slow and not gpu"

slow: $(STAMP)  ## run the slow tests
	$(PYTEST) -q -n $(JOBS) --dist worksteal -m "slow and not gpu"

zoo: $(STAMP)  ## run every test of the model zoo
	$(PYTEST) -q -n $(JOBS) --dist worksteal -k zoo -m "not gpu"

mutants: $(STAMP)  ## read 10,000 recipes with one word changed
	$(PYTEST) -q tests/test_recipes.py -m slow

fuzz: $(STAMP)  ## compose random attention spellings and look-alikes (CASES, SEED)
	$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

deploy: $(STAMP)  ## store, compile, export and decode every model of the zoo (DEPLOY="--sample 8")
	$(BIN)/python tests/bench/deploy.py $(DEPLOY)

large: $(STAMP)  ## rewrite a checkpoint larger than the memory allowed (LARGE="--folder /some/where")
	$(BIN)/python tests/bench/large.py $(LARGE)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types with mypy and pyright
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: $(STAMP)  ## inspect, explain and rewrite the bundled checkpoints
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

readme: $(STAMP)  ## put the demo's output of today in README.md
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/update_readme.py

build: $(STAMP)  ## build the wheel, and run it in an empty environment
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m venv --without-pip build/clean
	$(BIN)/python -m pip --python build/clean/bin/python install --quiet --no-deps dist/*.whl
	cd build && clean/bin/attnopt --help

bench: $(STAMP)  ## run the benchmarks, side by side with their baselines
	@set -e; for script in $(filter-out %/harness.py %/deploy.py %/deploy_rows.py %/large.py %/gpu.py %/gpu_masks.py,$(wildcard tests/bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

batteries: $(STAMP)  ## harm, kill and trap artifacts thousands of times; the counts are kept
	OMP_NUM_THREADS=1 $(BIN)/python tests/batteries/full.py

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info
