# make demo         create .venv, install, fit and test on generated images (offline)
# make test         the same set-up, then the test suite
# make check        lint, types and the fast tests: what to run after each change
# make test-extras  tests with other people's packages (timm, transformers, ONNX, MLflow), on top of .venv,
#                   and of report.html in a browser, which root gets by apt-get; they skip where there is none
# make test-oldest  the fast tests with the oldest versions that pyproject.toml allows, in an environment of their own
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := .venv-extras/bin
OLDEST := .venv-oldest/bin
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: demo test check test-extras test-oldest chromium lint format bench clean

.venv/.runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	@touch $@

# it sees the packages of .venv: torch, with CUDA, takes 6 GB of disk
.venv-extras/.installed: .venv/.dev
	$(PYTHON) -m venv --clear .venv-extras
	$(BIN)/python $(PACKAGES) > "$$($(EXTRAS)/python $(PACKAGES))/base.pth"
	$(EXTRAS)/pip install --quiet --editable ".[test,extras]"
	@touch $@

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST)/pip install --quiet uv
	$(OLDEST)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable ".[test]"
	@touch $@

demo: .venv/.runtime
	$(BIN)/pl-patchcore run --config demo

test: .venv/.dev
	$(BIN)/pytest -n auto

check: lint
	$(BIN)/pytest -n auto -m "not slow"

test-extras: .venv-extras/.installed chromium
	$(EXTRAS)/python -m pytest tests/extras

# newer packages below the old ones have deprecated what these use
test-oldest: .venv-oldest/.installed
	$(OLDEST)/pytest -n auto -m "not slow" -W ignore::DeprecationWarning

chromium:
	@command -v chromium || command -v chromium-browser || test "$$(id -u)" != 0 || { \
	export DEBIAN_FRONTEND=noninteractive; apt-get -qq update && \
	apt-get -qq install --no-install-recommends chromium; } > /dev/null 2>&1 || echo "no chromium: its tests skip"

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
	rm -rf .venv .venv-extras .venv-oldest demo
