# `make demo` edits a photo, `make test` checks everything; both make the environment in .venv first.
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed

.PHONY: demo test slow clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest

slow: $(READY)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build dist pbe.egg-info .pytest_cache .ruff_cache
	find pbe benchmarks tests tools examples -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is done again.
$(READY): setup.py
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("pbe needs Python 3.10 or newer, $(PYTHON) is " \
		+ sys.version.split()[0] + ": make PYTHON=/path/to/python3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[test]'
	touch $(READY)
