# `make demo` and `make test` each build .venv from the lock file first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
DEMO_DIR ?= runs/demo

.PHONY: demo test faults check lock clean

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dptrain needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $@

demo: $(VENV)/.ready  ## train a small private BERT on Python's own documentation
	$(BIN)/dptrain train --gin_file=demo.gin --gin.MODEL_DIR="'$(DEMO_DIR)'"

check: $(VENV)/.ready  ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## every check, and every test but the seeded faults and the longest
	$(BIN)/pytest -n 2 -m "not faults and not long"

faults: $(VENV)/.ready  ## break copies of the package (each time a test must turn red); the longest tests
	$(BIN)/pytest -n 2 -m "faults or long" tests

lock:  ## resolve the newest allowed versions into requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV)
