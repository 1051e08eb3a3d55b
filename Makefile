# Each target does its own set-up: a .venv, made once, renewed when the dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := .venv-gpu

.PHONY: train test test-long test-longest test-slurm test-gpu bench-gpu check docs dashboard bench build clean

train: $(VENV)/installed
	$(BIN)/python -m lmlab.train

test: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --ignore=tests/slurm -m "not long and not longest and not gpu"

# Ranks and whole runs in processes of their own, killed and gone on with.
test-long: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist load --ignore=tests/slurm -m long

# What is measured rather than tested, and services that are waited for: not at each change.
test-longest: $(VENV)/installed-dev
	$(BIN)/pytest --ignore=tests/slurm -m longest

# Real jobs on a SLURM of two nodes, brought up on this machine and taken down again.
test-slurm: $(VENV)/installed-dev
	@if [ "$$(id -u)" != 0 ]; then echo "test-slurm: skipped, as SLURM's daemons need root here"; exit; fi; \
	command -v apt-get > /dev/null || { echo "test-slurm: skipped, as there is no apt-get to install SLURM with"; exit; }; \
	command -v slurmctld > /dev/null || { apt-get update && apt-cache show slurmctld; } > /dev/null 2>&1 || \
		{ echo "test-slurm: skipped, as SLURM's packages can't be had here"; exit; }; \
	trap 'tests/slurm/cluster.sh down' EXIT; trap 'exit 1' INT TERM; \
	tests/slurm/cluster.sh up && eval "$$(tests/slurm/cluster.sh env)" && timeout -k 10 500 $(BIN)/pytest -vv -rs tests/slurm

# Real runs on a GPU, skipped where there is none.
test-gpu: $(GPU)/installed
	$(GPU)/bin/python -m pytest -rs --durations=0 --durations-min=1 -m gpu tests/gpu

bench-gpu: $(GPU)/installed
	$(GPU)/bin/python -m benchmarks gpu

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and the API reference, into site/; a broken link fails.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The runs that were logged by logger=trackio, in a browser: Ctrl+C ends it.
dashboard: $(VENV)/installed-trackio
	$(BIN)/trackio show --project lmlab

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

build: $(VENV)/installed-dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) $(GPU) build dist site

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmlab needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-trackio: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[trackio]'
	touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@ $(VENV)/installed

# For a GPU: over the packages of PYTHON, whose torch is used if it has one. constraints.txt is of a torch for CPUs. pip is
# that of PYTHON; without a network it installs wheels of a folder: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make test-gpu
$(GPU)/installed: pyproject.toml
	rm -rf $(GPU)
	$(PYTHON) -m venv --without-pip --system-site-packages $(GPU)
	@# To a virtual environment "system" is not the one whose Python made it.
	$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$$($(GPU)/bin/python -c \
		'import site; print(site.getsitepackages()[0])')/those-of-python.pth"
	$(PYTHON) -m pip --python $(GPU)/bin/python install -q -e . accelerate pytest pytest-timeout
	@echo "installed into $(GPU):" $$($(PYTHON) -m pip --python $(GPU)/bin/python list --local --format=freeze)
	@$(GPU)/bin/python -c 'import platform, lightning, torch, transformers as hf; \
		print("Python", platform.python_version(), "torch", torch.__version__, "transformers", hf.__version__, \
		"Lightning", lightning.__version__, "GPU:", torch.cuda.is_available() and torch.cuda.get_device_name())'
	touch $@
