# make install      .venv with the tested versions; for NVIDIA GPUs where there is a driver (GPU=0 or GPU=1 overrides)
# make quickstart   real images, corrupted, to a trained model and one picture   (DATASET=digits|fashion|emoji|faces)
# make test         the tests (JOBS=3 at once)          make lint, make types, make format
# make test-long    the tests that take minutes: the docs' commands, runs killed at random, adapters on two ranks, measured memory
# make test-slurm   starts a real SLURM of two nodes on this machine (root, Debian), and runs the tests that need one
# make test-ui      installs a headless browser (root, Debian), and drives MLflow's pages of a small store with it
# make audit        known weaknesses of the tested versions; needs the network
# make docs         the documentation as a site, in build/site; fails at a link that leads nowhere
# make bench        every measured promise in one table, in twenty minutes of two idle cores; make bench-compare AGAINST=FILE
# make directions   trains on images for about ten minutes, and checks that ours beats naive and ambient alone
PYTHON ?= python3
VENV ?= .venv
DATASET ?= digits
JOBS ?= 3
UI_SHOTS ?= /tmp/ambient-ui
# GPU decides which versions are installed. Without it: those that are installed, else a driver that lists a GPU decides.
FOUND = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1 || echo 0)
GPU ?= $(if $(wildcard $(VENV)/.installed-gpu),1,$(if $(wildcard $(VENV)/.installed),0,$(FOUND)))
ifneq ($(filter 0 1,$(GPU)),$(GPU))
$(error GPU=$(GPU): 1 installs the versions for NVIDIA GPUs, 0 the others)
endif
CONSTRAINTS := $(if $(filter 1,$(GPU)),constraints-gpu.txt,constraints.txt)
STAMP := $(VENV)/.installed$(if $(filter 1,$(GPU)),-gpu)
STARTED := $(shell date +%s)
BIN := $(VENV)/bin

.PHONY: install dev quickstart test test-long test-slurm test-ui directions bench bench-compare docs lint types format audit clean
install: $(STAMP)
dev: $(STAMP)-dev

$(STAMP): pyproject.toml constraints-common.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed*
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[datasets,evaluation,measured]'
	touch $@

$(STAMP)-dev: $(STAMP)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/python -c 'from trainer.models.clip_vocabulary import vocabulary; vocabulary()'
	touch $@

quickstart: install
	$(BIN)/python -m trainer.quickstart --dataset $(DATASET) --started $(STARTED)

TEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: dev
	$(TEST) -m "not long"

test-long: dev
	$(TEST) -m long

# Nothing is skipped then. The cluster is taken down again, also after a failure.
test-slurm: dev
	tests/slurm/cluster.sh up
	eval "$$(tests/slurm/cluster.sh env)"; $(BIN)/python -m pytest -m slurm tests/slurm; \
	code=$$?; tests/slurm/cluster.sh down; exit $$code

# Nothing is skipped then. UI_SHOTS: where screenshots go.
test-ui: dev
	tests/ui/browser.sh
	AMBIENT_TEST_UI=$(UI_SHOTS) $(BIN)/python -m pytest -m ui tests/ui; \
	code=$$?; echo "screenshots: $(UI_SHOTS)"; exit $$code

bench: dev
	$(BIN)/python -m benchmarks.suite

# AGAINST: an earlier benchmarks/results/suite.json.
bench-compare: dev
	$(BIN)/python -m benchmarks.suite --compare $(AGAINST)

directions: dev
	$(BIN)/python -m benchmarks.images --quick

docs: dev
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/pyright

# Needs the network. Known weaknesses of the versions that are tested.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement constraints-common.txt --requirement constraints.txt --no-deps --disable-pip --strict

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
