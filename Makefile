# The verbs of the project; CI runs the same ones. Needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test test-faults check format bench weights

install: $(READY)  ## the environment, .venv, and nothing else

demo: $(READY)  ## train the embedded model with DDPO on JPEG compressibility
	$(BIN)/diffusionrl train --name demo-$$(date +%Y%m%d-%H%M%S)

test: $(READY)  ## the test suite, a process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-faults: $(READY)  ## the whole campaign of faults; hours, may be stopped and taken up again
	$(BIN)/python benchmarks/faults.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the figures of the README and of docs/reproduction; hours, may be stopped and taken up again
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/ddpo_paper.py
	$(BIN)/python benchmarks/diffusionrl_paper.py
	$(BIN)/python benchmarks/guard.py

weights: $(READY)  ## the embedded model again, from its recipe
	$(BIN)/python -m diffusionrl.emoji.recipe vae
	$(BIN)/python -m diffusionrl.emoji.recipe classifier
	$(BIN)/python -m diffusionrl.emoji.recipe skin-tones
	$(BIN)/python -m diffusionrl.emoji.recipe detector
	$(BIN)/python -m diffusionrl.emoji.recipe detector-judge
	$(BIN)/python -m diffusionrl.emoji.recipe clip
	$(BIN)/python -m diffusionrl.emoji.recipe preference
	$(BIN)/python -m diffusionrl.emoji.recipe diffusion
	$(BIN)/python -m diffusionrl.emoji.recipe flow
	$(BIN)/python -m diffusionrl.emoji.recipe publish

# torch first and by its version, so that pip takes a CPU build where one is offered.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "making .venv: some minutes; about 2 GB with a PyTorch for the CPU, several more with one for CUDA"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
