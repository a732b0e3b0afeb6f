# Two commands for a stranger: `make demo` (a report on this machine) and `make test`.
# Both build .venv from nothing with plain pip.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format types check benchmark clean

demo: $(VENV)/.runs
	$(BIN)/lspzo-bench poc

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types test

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.installed
	$(BIN)/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# pip compiles file by file; this takes all cores, and leaves out the libraries' own tests. What is written for
# another Python has errors.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' $(VENV)/lib || true

# What the program needs, and LoRA, which a first comparison should have. torch comes first and alone: a
# machine with a CPU build at hand then keeps it.
$(VENV)/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch -c constraints.txt
	$(PIP) -e '.[lora]' -c constraints.txt
	$(COMPILE)
	touch $@

# What its tests need beside that.
$(VENV)/.installed: $(VENV)/.runs
	$(PIP) -e '.[dev]' -c constraints.txt
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
