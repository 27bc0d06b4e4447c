# One virtual environment for everything; `make demo`, `make test` and `make check` set it up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test test-quick test-all mutants exactness kill-and-resume end-to-end gpu gpu-wheels check format clean

help:           ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+: +##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## the virtual environment with pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,peft,dev]'
	@touch $@

demo: $(READY)  ## fine-tune a real model by DFT on this machine's CPU, in minutes
	$(BIN)/dft demo --config configs/demo.yaml

# Two processes, a whole file in one of them, so that what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(READY)  ## the whole test suite, with coverage, on two cores
	$(PYTEST) -m 'not exhaustive' --cov --cov-fail-under=90

test-quick: $(READY) ## the tests that need neither the real model nor other processes
	$(PYTEST) -m 'not slow and not exhaustive'

test-all: $(READY) ## every row of the large tables too (all combinations of recipes, all model families)
	$(PYTEST)

mutants: $(READY) ## 600 small changes of the numerical core: which of them no test notices (one to two hours, resumable)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS_OPTIONS)

exactness: $(READY) ## the table of every weighting × geometry × ranks: one gradient (make test has it in its quick form)
	OMP_NUM_THREADS=1 $(BIN)/python tests/exactness.py

kill-and-resume: $(READY) ## kill runs at 150 random moments, and start them again: the same to the bit
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 50
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 20 --ranks 2 --strategy ddp
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 20 --ranks 2 --strategy fsdp2
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 20 --ranks 2 --strategy ddp --victims all
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 20 --ranks 2 --strategy fsdp2 --victims all
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_and_resume.py --trials 20 --ranks 2 --strategy fsdp2 --sharded --asynchronous

end-to-end: $(READY) ## the real model on two ranks: trained, killed, gone on with, exported, asked
	OMP_NUM_THREADS=1 $(BIN)/python tests/end_to_end.py

# Where the virtual environment is not set up, as on a machine without network, by the Python that is there.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

gpu:            ## on a machine with an NVIDIA GPU: checks and speed of all that only runs there, within 14 minutes
	$(GPU_PYTHON) benchmarks/gpu $(GPU_OPTIONS)

gpu-wheels:     ## the packages that such a machine without network may lack, into .wheels
	PYTHONPATH=benchmarks $(GPU_PYTHON) -m gpu.wheels

check: $(READY) ## lint (the Dockerfile too), format and types, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(READY) ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:          ## remove caches and the virtual environment (runs/ is kept)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage *.egg-info
