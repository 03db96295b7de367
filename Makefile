# Every target does the set-up that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

NATIVE := $(shell find native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo serve test test-grid lint sanitize bench clean

demo: $(INSTALLED)
	$(BIN)/lamina demo

serve: $(INSTALLED)
	$(BIN)/lamina serve --attention-workers 2

test: lint
	$(BIN)/pytest

# Greedy tokens over every deployment; `make test` runs a set of them that has all pairs.
test-grid: $(INSTALLED)
	$(BIN)/pytest tests/grid/full_grid.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The native tests against a build with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(INSTALLED)
	tools/sanitize.sh $(BIN)

bench: $(INSTALLED)
	$(BIN)/lamina bench decode

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
