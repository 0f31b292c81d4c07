# Every target runs in .venv, which `make setup` builds once.
# Ruff, mypy and pytest read their settings from pyproject.toml.

PYTHON      ?= python3
BACKEND     ?= cpu
PYTEST_ARGS ?=
TEST_JOBS   ?= 2

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DEMO  := $(VENV)/.demo-done

CODE        := offline vllm_fptquant scripts benchmarks tests
SHELL_FILES := scripts/install.sh .ci/run
YAML_FILES  := mkdocs.yml docker/compose.yaml benchmarks/quick.yaml $(wildcard offline/fptquant/recipes/*.yaml)
DOCKERFILES := docker/Dockerfile.cpu docker/Dockerfile.gpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test newest oldest image-check release-check bench results beyond-perplexity docs lint typecheck format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## build .venv with everything (BACKEND=cpu|gpu|quantizer|none)

$(STAMP): pyproject.toml scripts/install.sh
	scripts/install.sh --venv $(VENV) --python $(PYTHON) --backend $(BACKEND) --dev
	@touch $@

$(DEMO): pyproject.toml scripts/install.sh
	scripts/install.sh --venv $(VENV) --python $(PYTHON) --backend $(BACKEND) --demo
	@touch $@

# The tools for tests aren't waited for where there are none yet.
demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO))  ## quantize a real model, serve it, ask it a question
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## run the tests (PYTEST_ARGS="-m 'not slow'" for the quick ones, TEST_JOBS=1 one by one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --no-loadscope-reorder $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(BIN)/python scripts/compatibility.py test)

newest:  ## check the quantizer in an environment of its own with the newest versions that pyproject.toml allows
	$(PYTHON) scripts/check_versions.py newest

oldest:  ## the same with the oldest versions (7 GB of disk while it runs where there is no CPU build of that torch)
	$(PYTHON) scripts/check_versions.py oldest

release-check:  ## build what is to be uploaded into dist/, install the source archive in a fresh environment and use it
	$(PYTHON) scripts/check_versions.py release

image-check: $(STAMP)  ## carry out docker/Dockerfile.cpu without Docker and use the result (root, debootstrap, minutes)
	$(BIN)/python scripts/check_image.py

bench: $(STAMP)  ## measure speed and memory against unquantized serving
	$(BIN)/python benchmarks/bench.py

results: $(STAMP)  ## measure all methods and recipes against each other (hours, resumable)
	$(BIN)/python benchmarks/results.py

beyond-perplexity: $(STAMP)  ## measure tasks, KL, long texts and generated text: ORIGINAL=MODEL CHECKPOINTS="NAME=OUT ..." (an hour, resumable)
	$(BIN)/python benchmarks/beyond_perplexity.py $(ORIGINAL) $(CHECKPOINTS)

docs: $(STAMP)  ## build the pages of docs/ into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)  ## ruff, shellcheck, yamllint, hadolint
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/yamllint --strict $(YAML_FILES)
	$(BIN)/hadolint $(DOCKERFILES)

typecheck: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

format: $(STAMP)  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:  ## remove what the targets above built, .venv included
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-peers .venv-llama-cpp build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
