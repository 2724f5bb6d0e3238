# UNIT. `make help` lists the targets. Everything runs in .venv, made on first use and renewed when setup.py or
# constraints.txt changes. Variables: PYTHON (the interpreter to start from), VENV, WORKERS (processes), MODEL.

SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
MODEL ?= modeling_unit/checkpoints/unit-tiny

BIN := $(VENV)/bin
PY := $(BIN)/python
UNIT := $(PY) -m unit_cli
PIP := $(PY) -m pip --disable-pip-version-check install --progress-bar off -q -c constraints.txt
REQUIREMENTS := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test quality format bench data train evaluate clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.base ## read sample pages and name sample pictures with the shipped checkpoint; writes demo_output/
	$(PY) -m spaces_demo.sample_run

# One thread a worker: on few cores the workers' own threads would only wait for each other.
test: $(VENV)/.dev ## run the whole test suite
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(PYTEST)

quality: $(VENV)/.dev ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev ## mend what `make quality` complains about, where that can be done by a program
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.dev ## run all benchmarks, about an hour on two cores; see benchmarks/README.md
	$(PY) -m benchmarks.parity_released
	$(PY) -m benchmarks.parity_architectures
	$(PY) -m benchmarks.encoder
	$(PY) -m benchmarks.packed --reading
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.load
	$(PY) -m benchmarks.export
	$(PY) -m benchmarks.read_page
	$(PY) -m benchmarks.training_step
	$(PY) -m benchmarks.training_peers
	$(PY) -m benchmarks.training_memory
	$(PY) -m benchmarks.lora_memory
	$(PY) -m benchmarks.devices --speed

data: $(VENV)/.dev ## fetch and build all training and validation data into the cache (UNIT_CACHE)
	$(UNIT) data from-pdfs --split validation --workers $(WORKERS)
	$(UNIT) data from-pdfs --workers $(WORKERS)
	$(UNIT) data pictures
	$(UNIT) data make-pages --workers $(WORKERS)
	$(UNIT) data targets
	$(UNIT) data lines --workers $(WORKERS)
	$(UNIT) data make-markdown --split validation --workers $(WORKERS)
	$(UNIT) data evaluation-sets --workers $(WORKERS)
	$(UNIT) data check-leaks

train: $(VENV)/.dev ## train unit-tiny by its recipes in order; takes hours on two cores, goes on where it was stopped
	set -e; for recipe in training/recipes/unit-tiny/[0-9]*.yaml; do $(UNIT) train $$recipe; done

evaluate: $(VENV)/.dev ## measure MODEL on the held-out data; writes evaluation/report.md
	$(UNIT) evaluate $(MODEL) --peers tesseract --out evaluation

clean: ## remove the environment and what the other targets wrote here; the data cache stays
	rm -rf $(VENV) demo_output evaluation build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "UNIT needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo not there)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }

$(VENV)/.base: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) (PyTorch among it: a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) with the extra 'dev' (PyTorch among it: a few minutes the first time)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.base
