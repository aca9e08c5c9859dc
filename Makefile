# Two commands for a fresh machine: `make demo` runs the main job, `make test` passes the tests. Each installs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint docs floor clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m benchmarks.grounding.demo $(ARGS)

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

# The tests on the oldest versions that pyproject.toml allows; not part of `make test`, since it downloads 5 GB.
floor:
	bash tests/floor.sh

# Whatever decides what is installed is a prerequisite; the stamp is newer than all of it.
.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-floor-* .venv-newest .venv-fuzz .venv-supply runs docs/_build dist build .coverage* .pytest_cache .ruff_cache .hypothesis
