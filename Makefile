# Targets: demo, test, test-exhaustive, test-browser, test-llama-cpp, test-readers, chromium, check, docs, notebook, figures,
# bench, bench-gpu, test-gpu, test-oldest, wheel-test, dist, publish. Those that need an environment make it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE := $(VENV)-llama-cpp
READERS := $(VENV)-readers
READERS_4 := $(VENV)-readers-4
OLDEST := $(VENV)-oldest
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal
# Checks types and shapes at every call, which takes as long again as what is called: for tests of numerics only, of a
# variant of each form of block (tests/conftest.py).
TYPES := --jaxtyping-packages=hifiprune,beartype.beartype
TYPED := $(addprefix tests/test_,$(addsuffix .py,allocation calibration criteria cut cutting evaluation experts families fisher \
	objectives repair scoring scratch streaming training_loss))

.PHONY: demo test test-exhaustive test-browser test-llama-cpp test-readers chromium check docs notebook figures bench bench-gpu \
	test-gpu test-oldest wheel-test dist publish

demo: $(VENV)/.installed
	@$(BIN)/hifiprune demo --output demo-out

test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive"

test-exhaustive: $(VENV)/.dev
	$(PYTEST) -m exhaustive
	$(PYTEST) $(TYPES) -m "not exhaustive" $(TYPED)

test-browser: $(VENV)/.dev chromium
	HIFIPRUNE_BROWSER=1 $(BIN)/python -m pytest tests/test_report.py

test-llama-cpp: $(ENGINE)/.installed
	$(ENGINE)/bin/python benchmarks/llama.py

test-readers: $(READERS)/.installed $(READERS_4)/.installed
	$(READERS)/bin/python -m benchmarks.readers

chromium:
	@command -v chromium > /dev/null || (apt-get update && apt-get install --yes --no-install-recommends chromium)

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html"

notebook: $(VENV)/.docs
	$(BIN)/python examples/run.py

figures: $(VENV)/.dev
	$(BIN)/python -m benchmarks.figures

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/hifiprune demo --output demo-out --overwrite
	cp demo-out/demo.json benchmarks/results/demo.json

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m "not exhaustive" $(addprefix tests/test_,$(addsuffix .py,products criteria repair scoring \
		cut cutting experts streaming resuming recovery cli))

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_gpu.py -m "not exhaustive"

wheel-test: $(VENV)/.dev
	rm -rf dist build/lib build/bdist.* build/env build/pruned
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/env
	build/env/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(BIN)/python -c "from pathlib import Path; from hifiprune.commands.demo import fetch_smollm2; fetch_smollm2(Path('.cache/smollm2'))"
	cd build && env/bin/hifiprune --version && env/bin/hifiprune inspect ../.cache/smollm2
	cd build && env/bin/hifiprune prune ../.cache/smollm2 --output pruned --ratio 0.2 --calibration python-docs \
		--num-samples 2 --seq-len 128 --repair none

dist: $(VENV)/.docs
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

publish: dist
	$(BIN)/twine upload dist/*

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing hifiprune and what it needs into $(VENV): about 1.6 GB, a minute or more ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV) ..."
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable .[dev]
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@echo "Installing what the documentation needs into $(VENV) ..."
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable .[docs]
	@touch $@

$(ENGINE)/.installed: pyproject.toml constraints.txt benchmarks/llama.py
	@echo "Building llama.cpp from source in $(ENGINE) (20 minutes on 2 cores) ..."
	@test -x $(ENGINE)/bin/python || $(PYTHON) -m venv $(ENGINE)
	@$(ENGINE)/bin/pip install --quiet --constraint constraints.txt --editable .[gguf]
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF" $(ENGINE)/bin/pip install --quiet \
		--constraint constraints.txt --no-binary llama-cpp-python \
		$$(sed -n 's/^SDIST = "\(.*\)"/\1/p' benchmarks/llama.py)
	@touch $@

$(READERS)/.installed: pyproject.toml constraints.txt Makefile
	@echo "Making the environment in $(READERS), with mlx-lm on a CPU ..."
	@test -x $(READERS)/bin/python || $(PYTHON) -m venv $(READERS)
	@$(READERS)/bin/pip install --quiet --constraint constraints.txt --editable .[gguf] mlx-lm==0.32.2 'mlx[cpu]==0.32.4'
	@touch $@

$(READERS_4)/.installed: constraints.txt Makefile
	@echo "Making the environment in $(READERS_4), with transformers 4.57.6 ..."
	@test -x $(READERS_4)/bin/python || $(PYTHON) -m venv $(READERS_4)
	@$(READERS_4)/bin/pip install --quiet transformers==4.57.6 $$(grep -E '^(torch|numpy|safetensors)==' constraints.txt)
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	@echo "Making the environment in $(OLDEST), with the oldest torch (a build for GPUs: 6 GB) ..."
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -Ev '^(torch|torchao|sympy)==' constraints.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --constraint constraints-oldest.txt \
		--editable . beartype hypothesis pytest
	@touch $@
