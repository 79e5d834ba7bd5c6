# make demo: build, then run the embedded model.   make test: build, then the tests.   Everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# From tests/, beside the built package: the sources are not what is tested.
PYTEST := ../$(BIN)/python -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider -n auto --dist worksteal

.PHONY: demo test quick fuzz bench lint clean

$(VENV)/built: pyproject.toml setup.py $(shell find src_c forge_c -name '*.[chp]*' -not -name '*.pyc' -not -path '*/__pycache__/*')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '.[test]'
	touch $@

demo: $(VENV)/built
	cd $(VENV) && bin/forge-c generate --prompt "$$(printf 'import os\nimport sys\n\nclass Stack:\n')" --max-new-tokens 300 --temperature 0.7 --seed 1

test: $(VENV)/built  ## Build, then all tests, on all cores
	cd tests && $(PYTEST) .

quick: $(VENV)/built  ## Build, then every test on the best ISA with few of its cases: for the inner loop
	cd tests && $(PYTEST) --quick .

fuzz: $(VENV)/built
	$(BIN)/python -m fuzz --seconds $(or $(FUZZ_SECONDS),3600) $(FUZZ_OPTIONS)

bench: $(VENV)/built
	$(BIN)/pip install --quiet '.[bench]'
	$(BIN)/python bench/run.py

lint: $(VENV)/built
	$(BIN)/pip install --quiet '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info forge_c/*.so forge_c/functional.c forge_c/include \
		examples/c_pipeline/decode examples/cython_pipeline/build examples/cython_pipeline/*.so \
		examples/cython_pipeline/block.c
