# `make` alone lists what there is. Everything runs in .venv, which is rebuilt when its recipe changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
BENCH := .venv/.bench
DOCS := .venv/.docs

# A chosen few tests say nothing about the coverage of the whole.
COVERAGE := $(if $(strip $(ARGS)),--no-cov,--cov --cov-report=term)
# Most tests wait for something most of the time: four at a time keep two cores busy. A chosen few run in order.
WORKERS := $(if $(strip $(ARGS)),,--numprocesses=4 --dist=loadfile)

.PHONY: help demo test soak bench bench-smoke lint format types contract wheel docs check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: $(READY) ## an outage, a kill -9 and a recovery, against a local Per
	@$(BIN)/perqueue demo

test: $(READY) ## all tests, with coverage; or some: make test ARGS="-k flush -x"
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest --durations=10 $(WORKERS) $(COVERAGE) $(ARGS)

soak: $(READY) ## the long rounds of the fault tests, an hour or so: PERQUEUE_SOAK_SECONDS for the soak itself
	@PERQUEUE_SOAK=1 $(BIN)/python -m pytest --no-cov -s --timeout=3600 tests/faults tests/embedded/test_kill.py $(ARGS)

bench: $(BENCH) ## what everything costs beside other libraries, into docs/; or some: make bench ARGS="--only drain"
	@$(BIN)/python benchmarks/run.py $(ARGS)

# Without the packages that `bench` compares with: their releases must neither break a change here nor slow CI.
bench-smoke: $(READY) ## a few calls of each benchmark: do they still run?
	@$(BIN)/python benchmarks/run.py --smoke

lint: $(READY) ## style: ruff's rules and its formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY) ## let ruff repair what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(READY) ## mypy, strict
	@$(BIN)/mypy perqueue $(wildcard tests/typing examples benchmarks)

contract: $(READY) ## the layering rule: nothing imports upwards
	@$(BIN)/lint-imports

wheel: $(READY) ## build sdist and wheel into dist/, and try the wheel by itself
	@.ci/check-wheel $(BIN)/python

docs: $(DOCS) ## build the documentation into build/site; a warning is an error
	@$(BIN)/sphinx-build -E -q -W --keep-going -b html docs build/site

check: lint types contract wheel docs bench-smoke test ## all of the above, as CI does

clean: ## remove everything that was made here
	@rm -rf .venv dist build .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The version is part of the installed metadata, so a new one needs a new installation.
$(READY): pyproject.toml perqueue/_version.py .ci/make-venv
	@echo 'Setting up .venv (once, and again whenever pyproject.toml changes) ...'
	@.ci/make-venv "$(PYTHON)" .venv
	@$(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -qq --group dev --editable '.[fast,postgres,sandbox,report,datasette]'
	@touch $@

$(DOCS): $(READY)
	@echo 'Adding what builds the documentation to .venv ...'
	@$(BIN)/python -m pip install -qq --group docs
	@touch $@

$(BENCH): $(READY)
	@echo 'Adding what the benchmarks compare with to .venv ...'
	@$(BIN)/python -m pip install -qq --group bench
	@touch $@
