# The first call of a goal that runs Python sets up .venv; later ones only when the pins change.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-long demo-base test test-cluster soak lint clean

help:
	@echo 'make demo       compress, then match, on the built-in pictures (10 minutes on 2 cores with AVX-512)'
	@echo 'make demo-long  the same with more steps (an hour)'
	@echo 'make demo-base  train the model that the demo starts from again (hours)'
	@echo 'make test       linter and tests (half an hour on 2 cores; 8 minutes more with SLURM)'
	@echo 'make test-cluster  those on a SLURM of virtual nodes alone (needs root; installs SLURM)'
	@echo 'make soak       100 SIGKILLs over one run, whose end must be that of one left alone (an hour;'
	@echo '                SOAK=FOLDER takes its report, default runs/soak)'
	@echo 'make lint       linter only'
	@echo 'make clean      remove build products and caches; runs/ and $(VENV) stay'

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@echo 'set-up: $(VENV) and the pinned packages (once)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)
	@$(PY) -m coma_ds.commands.demo

demo-long: $(STAMP)
	@$(PY) -m coma_ds.commands.demo --long

# The shipped base: a folder without weights, hours of training, the result in the package.
BASE := coma_ds/data/models/demo-base
BASE_RUN ?= runs/demo-base
demo-base: $(STAMP)
	$(PY) -m coma_ds.commands.demo_base $(BASE_RUN)-start
	$(PY) coma_ds/train.py --recipe demo-base model.path=$(BASE_RUN)-start output=$(BASE_RUN)
	$(PY) -m coma_ds.commands.demo_base --install $(BASE_RUN) $(BASE)

lint: $(STAMP)
	@$(PY) -m ruff check .

test: lint
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/cluster
	@$(PY) -m pytest tests/cluster

# With this SLURM is installed, and a test of the cluster that is skipped has failed.
test-cluster: export COMA_REQUIRE_CLUSTER = 1
test-cluster: $(STAMP)
	@$(PY) -m pytest tests/cluster

SOAK ?= runs/soak
soak: $(STAMP)
	@$(PY) -m tests.faults.soak --output $(SOAK)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find coma_ds kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
