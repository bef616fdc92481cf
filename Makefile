# Everything lives in .venv. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Several torch processes share the cores here; spinning threads would starve each other.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install setup quickstart try test lint audit clean
help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready ## Install the package and the developer's tools into .venv

# torch is installed first, from its CPU build where there is no GPU: an unpinned torch pulls gigabytes of CUDA libraries.
TORCH_INDEX := $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --quiet --no-deps --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[documents,serve]"
	touch $@

# Tests and benchmarks compare with liger-kernel. Installed without its dependencies: triton exists only for Linux.
$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable .
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps liger-kernel
	touch $@

install: $(VENV)/.installed ## Install the package alone, with document readers and the server, into .venv

quickstart: install ## GRPO, self-distillation and GRPO again in the small world
	$(BIN)/search-e1 world runs/quickstart-world
	$(BIN)/search-e1 train configs/quickstart.toml

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

audit: setup ## Check the installed packages against PyPI's advisories
	$(BIN)/pip install --quiet --constraint constraints.txt --group audit
	$(BIN)/python scripts/audit.py

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs
