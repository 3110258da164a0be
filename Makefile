# make bench [ARGS="method=graddot task=digits"]   install if needed, run, print the table
# make test / make check                           the whole suite / ruff and mypy
# PIP_ARGS chooses PyTorch's build, for example
#   make bench PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: bench test check format install peers clean

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev,cluster]'
	touch $@

# The peers ask for torchvision and CUDA builds that their CPU paths never import: install them without dependencies,
# and beside them the few light packages that they do import.
peers: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps \
		kronfluence curvlinops-for-pytorch traker backpack-for-pytorch unfoldnd cleanlab
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt accelerate einops einconv linear_operator opt_einsum \
		termcolor

clean:
	rm -rf results/runs results/cache results/tables results/sweeps
