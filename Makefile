# Each target stands alone: it sets .venv up first when that is missing or out of date.
#   PYTHON=/path/to/python3.12 make install    another interpreter (3.12 or newer)
#   UV_TORCH_BACKEND=cpu make install          with uv: torch without its CUDA libraries

PYTHON ?= $(shell command -v python3.12 || command -v python3)
UV ?= $(shell command -v uv)
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
FAULTS ?=
# Number of a slice of the slow tests, 0 to 10: another one with each commit.
SLICE ?= $(shell echo $$(( $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 11 )))
BENCH_FLAGS ?=
BENCH ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
PACKAGE := -e '.[demo,dev]' -c constraints.txt

# Tests run side by side, each process with ranks of its own. What a tier may cost is counted in
# seconds of processor time: on two cores half as long.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal
TEST_BUDGET_S := 1200
TEST_CI_BUDGET_S := 1600

.PHONY: install demo demo-short test test-ci test-all test-faults lint docs bench bench-results \
  clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Create .venv and install the package with its demo and dev extras

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  echo "error: need Python 3.12 or newer, found '$(PYTHON)'" \
	    "($$("$(PYTHON)" --version 2>&1)): install it, or set PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
	  echo "creating .venv with $$("$(PYTHON)" --version)"; \
	  if [ -n "$(UV)" ]; then "$(UV)" venv --quiet --clear --python "$(PYTHON)" .venv; \
	  else "$(PYTHON)" -m venv --clear .venv || { \
	    echo "error: '$(PYTHON) -m venv' failed; Debian and Ubuntu keep it in python3-venv" >&2; \
	    exit 2; }; \
	  fi; \
	fi
	@echo "installing (a few minutes the first time)"
	@if [ -n "$(UV)" ]; then "$(UV)" pip install --quiet --compile-bytecode --python $(BIN)/python $(PACKAGE); \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PACKAGE); fi
	@touch $@

demo: $(INSTALLED)  ## Train a small vision-language model on two grids, 4 ranks (about 3 minutes)
	@$(BIN)/megatron-mimo demo $(DEMO_FLAGS)

demo-short: $(INSTALLED)  ## The demo for a few iterations: that it runs, not what it learns
	@$(BIN)/megatron-mimo demo --train-iters 20 --out runs/demo-short $(DEMO_FLAGS)

test: $(INSTALLED)  ## Run the tests that find nearly everything (at most 10 minutes on two cores)
	@$(PYTEST) -m "not slow" --processor-budget $(TEST_BUDGET_S) $(PYTEST_FLAGS)

test-ci: $(INSTALLED)  ## The same, and a slice of the slow ones: SLICE=3 asks for one
	@$(PYTEST) --slow-slice $(SLICE) --processor-budget $(TEST_CI_BUDGET_S) $(PYTEST_FLAGS)

test-all: $(INSTALLED)  ## Run every test, and properties on all their examples (for a release)
	@$(PYTEST) --hypothesis-profile full $(PYTEST_FLAGS)

test-faults: $(INSTALLED)  ## Plant faults one by one and see that the tests find them: FAULTS="NAME ..."
	@$(BIN)/python -m tests.faults $(FAULTS)

lint: $(INSTALLED)  ## Check style, types and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(INSTALLED)  ## Write the pages of docs/ that come from the code
	@$(BIN)/python docs/reference/write_pages.py

bench: $(INSTALLED)  ## Run every benchmark against its peer (BENCH_FLAGS=--quick for a short round)
	@found=; for file in benchmarks/bench_*.py; do [ -e "$$file" ] || continue; found=1; \
	  $(BIN)/python "$$file" $(BENCH_FLAGS) || exit 1; done; \
	  [ -n "$$found" ] || echo "benchmarks/ holds no bench_*.py yet"

bench-results: $(INSTALLED)  ## Measure and write benchmarks/RESULTS.md (BENCH=bench_step: its tables alone)
	@$(BIN)/python benchmarks/write_results.py $(BENCH_FLAGS) $(BENCH)

clean:  ## Remove .venv and every cache; runs/ stays
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
