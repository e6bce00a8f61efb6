# One set-up for everything: `make run` and `make test` each do it when it is missing, and find each other's.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Oversubscribed, spinning threads are what makes small networks slow on a processor.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: run test check ui clean setup

run: $(READY)  ## materialise the recipe quickstart, print its figures and the report's path
	$(BIN)/derm run quickstart

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

check: $(READY)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: $(READY)  ## dagster's UI on http://127.0.0.1:3000, with persistent storage in data/dagster
	$(BIN)/dagster dev --host 127.0.0.1 --port 3000

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ui,dev]'
	touch $@

clean:  ## remove the set-up and caches; data/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .tmp_dagster_home_* *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
