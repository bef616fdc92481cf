# Everything lives in .venv. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Several torch processes share the cores here; spinning threads would starve each other.
export OMP_WAIT_POLICY := PASSIVE
RUN ?= runs/quickstart

.PHONY: help install setup quickstart try test lint audit clean
help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready ## Install the package and the developer's tools into .venv

# torch is installed first, from its CPU build where there is no GPU: an unpinned torch pulls gigabytes of CUDA libraries.
TORCH_INDEX := $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --quiet --no-deps --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[documents,serve]"
	touch $@

# liger-kernel is what tests and benchmarks compare with. Without what it requires: a triton, which exists for Linux alone.
$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable .
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps liger-kernel
	touch $@

install: $(VENV)/.installed ## Install the package alone, with document readers and the server, into .venv

quickstart: install ## Two rounds of GRPO and self-distillation in the small world
	$(BIN)/search-e1 world $(RUN)-world
	$(BIN)/search-e1 train --config configs/quickstart.toml --run $(RUN)

try: install ## From a folder of documents (docs/) to an agent that answers three questions, without a network
	$(BIN)/search-e1 data ingest docs --out runs/try-corpus
	test -d runs/try-questions || $(BIN)/search-e1 data questions --corpus runs/try-corpus --out runs/try-questions --by rule
	$(BIN)/search-e1 train configs/try.toml
	$(BIN)/python scripts/first_questions.py 3 runs/try-questions/train.jsonl | $(BIN)/search-e1 chat --agent runs/try/agent

test: setup ## Run the tests
	$(BIN)/pytest -n 2

lint: setup ## Formatting, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: setup ## Look the installed packages up in PyPI's advisories
	$(BIN)/pip install --quiet --constraint constraints.txt --group audit
	$(BIN)/python scripts/audit.py

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs
