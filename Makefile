# make demo   create .venv, install, fit and test on generated images (offline)
# make test   the same set-up, then the test suite
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench clean

.venv/.runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	@touch $@

demo: .venv/.runtime
	$(BIN)/pl-patchcore run --config configs/demo.yaml

test: .venv/.dev
	$(BIN)/pytest -n auto

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	for bench in tests/benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

clean:
	rm -rf .venv demo
