# The two commands of the README: `make demo` and `make test`. `make check` is what a change must pass first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The release that the project is tested with. On a machine without a GPU, PyTorch's own index has a smaller CPU build:
# make demo PIP_TORCH="--index-url <the CPU index named on pytorch.org> torch"
PIP_TORCH ?= torch==2.13.0

.PHONY: demo test test-fast test-long check format docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/gpt/demo.sh

test: $(VENV)/.installed-dev
	bash tests/install_system_packages.sh
	$(BIN)/python tests/install_deepspeed_peer.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/side_by_side.py $(PYTEST_ARGS)

# Without Slurm, MPI or whole jobs: what needs seconds.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slurm and not hosts and not mpi and not ranks and not local" $(PYTEST_ARGS)

# What takes too long for every change: hundreds of saves that are killed on the way, thirty events over one run on Slurm,
# 32 ranks with torch on 32 nodes.
test-long: $(VENV)/.installed-dev
	HPCDS_LONG=1 $(BIN)/python -m pytest tests/checkpoint/test_chaos.py tests/test_soak.py \
		tests/slurm/test_slurm_launch.py $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What is made from the program: a test asserts that it is current.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_config.py

clean:
	rm -rf $(VENV) .deepspeed build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
