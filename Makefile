# Everything on a fresh machine: `make demo`, `make test`. PYTHON chooses the interpreter that makes the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-quick lint format clean

demo: $(VENV)/.installed
	$(BIN)/dragonclf demo --out demo-run

# Whole jobs two at a time, since half of each is a start that keeps one core busy; those that are about time one at a time
test: test-quick
	$(BIN)/pytest -n 2 --dist loadfile tests/integration -m 'not alone'
	$(BIN)/pytest tests/integration -m alone

# Without the tests that start Ray or run a whole job
test-quick: $(VENV)/.installed
	$(BIN)/pytest -n 2 tests/unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-run dist

# The environment is made anew when its description changes. Versions are pinned by constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "dragonclf needs Python 3.11 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,demo,dev]'
	touch $@
