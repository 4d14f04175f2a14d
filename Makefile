# The whole set-up is one virtual environment in .venv; every target makes it if it is missing.
#
#   make demo    run sweeps/demo.yaml end to end
#   make test    run the tests
#   make reference   write docs/sweep-file.md and its JSON Schema anew
#   make check   lint, types, import contracts, tests: what CI runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test browser reference check lint types contracts format clean

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	    f"prunefield needs Python 3.11 to 3.13, found {v.major}.{v.minor}; make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/prunefield run sweeps/demo.yaml

browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	    { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qqy chromium; } >/dev/null 2>&1 || \
	    echo "no Chromium here: the tests of the report in a browser will be skipped"

test: $(STAMP) browser
	$(BIN)/python -m pytest

reference: $(STAMP)
	$(BIN)/prunefield schema --markdown -o docs/sweep-file.md
	$(BIN)/prunefield schema -o docs/sweep.schema.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

# The kernels' tests run in Triton's interpreter where there is no GPU. PyTorch for CUDA brings its
# own Triton; beside PyTorch for CPUs it is 0.6 GB that nothing but these tests needs.
TRITON := triton==3.6.0
$(VENV)/.triton: $(STAMP)
	@$(BIN)/python -c 'import triton' 2>/dev/null \
	    || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TRITON) \
	    || echo "no $(TRITON) for this platform: the tests of the fused kernels are skipped"
	touch $@

check: $(VENV)/.triton lint types contracts test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
