# make demo         create .venv, install, fit and test on generated images (offline)
# make test         the same set-up, then the test suite
# make check        lint, types and the fast tests: what to run after each change
# make test-extras  tests with other people's packages (timm, transformers, ONNX, MLflow), in an environment of their own
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := .venv-extras/bin

.PHONY: demo test check test-extras lint format bench clean

.venv/.runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	@touch $@

.venv-extras/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-extras
	$(EXTRAS)/pip install --quiet --editable ".[test,extras]"
	@touch $@

demo: .venv/.runtime
	$(BIN)/pl-patchcore run --config demo

test: .venv/.dev
	$(BIN)/pytest -n auto

check: lint
	$(BIN)/pytest -n auto -m "not slow"

test-extras: .venv-extras/.installed
	$(EXTRAS)/pytest tests/extras

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
	rm -rf .venv .venv-extras demo
