# Targets: demo, test, check, bench, wheel-test. All of them make the environment first if it is not there.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench wheel-test

demo: $(VENV)/.installed
	$(BIN)/hifiprune demo --output demo-out

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/scoring.py

wheel-test: $(VENV)/.dev
	rm -rf dist build/wheel-env
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel-env/bin/hifiprune --version && wheel-env/bin/hifiprune prune --help > /dev/null
	cd build && wheel-env/bin/hifiprune inspect ../.cache/smollm2 --json > /dev/null

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@
