# `make demo` edits a photo, `make test` checks everything, `make docs` builds the site: each makes what it needs of the
# environment in .venv first. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Stamps of what is installed: the package alone, and what each extra adds. A stamp is written last, so an interrupted
# installation is done again.
CORE := $(VENV)/installed
TEST := $(VENV)/installed-test
DOCS := $(VENV)/installed-docs

.PHONY: demo test slow fuzz docs clean

demo: $(CORE)
	$(BIN)/python examples/demo.py

test: $(TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(TEST)
	$(BIN)/python -m pytest -m slow

# make fuzz SECONDS=1800
SECONDS ?= 60
fuzz: $(TEST)
	$(BIN)/python -m tests.fuzz.checkpoints --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz.models --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz.pictures --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz.rows --seconds $(SECONDS)

docs: $(DOCS)
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site pbe.egg-info .pytest_cache .ruff_cache .mypy_cache
	find pbe tests tools examples integrations benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(CORE): setup.py
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("pbe needs Python 3.10 or newer, $(PYTHON) is " \
		+ sys.version.split()[0] + ": make PYTHON=/path/to/python3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable .
	touch $@

$(TEST): $(CORE)
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

$(DOCS): $(CORE)
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@
