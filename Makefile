# Every target makes the virtual environment and installs what it needs by itself.
#   make test VENV=/tmp/venv         another virtual environment
#   make test ARGS="-k loss"         further arguments for pytest
#   make demo WORKDIR=/tmp/demo      another place for the demo's results
#   make demo PYTHON=python3.12      another Python (3.11 or newer)

ifeq ($(filter-out 0 1 2 3,$(firstword $(subst ., ,$(MAKE_VERSION)))),)
$(error GNU make 4 or newer is needed, this is $(MAKE_VERSION). On a Mac: install GNU make and type gmake)
endif

# Small matrices are factorized faster by one thread of OpenBLAS than by several that
# wait for each other on busy cores. A large model, run by hand, gets them all.
export OPENBLAS_NUM_THREADS ?= 1

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one virtual environment get in each other's way
.PHONY: help demo test test-slow lint format clean

VENV ?= .venv
WORKDIR ?= runs/demo
ARGS ?=
# The first that runs and is new enough; python3 if none is, to be named in the message.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
  done; echo $$python)

python := $(VENV)/bin/python
log := $(VENV)/install.log
# One stamp for each set of packages: the demo installs neither torch nor pytest.
core := $(VENV)/.installed-core
test := $(VENV)/.installed-test
dev := $(VENV)/.installed-dev

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

demo: $(core)  ## plant singular defects in a small model, find them, repair them
	@$(python) -m experiments.repair --config=tiny.py --workdir='$(WORKDIR)'
	@echo "The pictures and summary.json are in $(abspath $(WORKDIR))"

test: $(test)  ## all tests but the slow ones (under ten minutes on two cores)
	@$(python) -m pytest $(ARGS)

test-slow: $(test)  ## the slow tests, to be run before a release
	@$(python) -m pytest -m slow $(ARGS)

lint: $(dev)  ## check format, style and types
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy

format: $(dev)  ## format the code, mend what can be mended
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

clean:  ## remove the virtual environment and all caches, but no results
	@test ! -e '$(VENV)/pyvenv.cfg' || rm -rf '$(VENV)'
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(python):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"sinder_jax needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}." \
	  " Say which to use: make PYTHON=/path/to/python3.11 ...")'
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv '$(VENV)'

$(core): extras :=
$(test): extras := [test]
$(dev): extras := [dev]
$(core) $(test) $(dev): pyproject.toml constraints.txt | $(python)
	@echo "Installing sinder_jax$(extras) into $(VENV): a few minutes the first time"
	@$(python) -m pip --disable-pip-version-check install -c constraints.txt \
	  -e '.$(extras)' > $(log) 2>&1 || { tail -n 40 $(log) >&2; exit 1; }
	@touch $@
