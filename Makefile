# Each target stands alone: it sets .venv up first when that is missing or out of date.
#   PYTHON=/path/to/python3.12 make install    another interpreter (3.12 or newer)
#   UV_TORCH_BACKEND=cu130 make install        another build of torch, by uv's name (scripts/install.sh)

PYTHON ?= $(shell command -v python3.12 || command -v python3)
UV ?= $(shell command -v uv)
DEMO_FLAGS ?=
DEMO_OMNI_FLAGS ?=
PYTEST_FLAGS ?=
FAULTS ?=
# Number of a slice of the slow tests, 0 to 10: another one with each commit.
SLICE ?= $(shell echo $$(( $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 11 )))
BENCH_FLAGS ?=
BENCH ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

# Transformer Engine's Python package, which tests run over kernels of their own: the lowest supported
# version and the newest one. Beside the environment, never in it.
TE_FOLDER := .cache/transformer-engine
TE := $(patsubst %,$(TE_FOLDER)/%/.fetched,2.11.0 2.20.2)

# mamba-ssm, whose Triton kernels tests run in Triton's interpreter, in the lowest supported version and
# the newest one; causal-conv1d, which it imports; Triton, for an environment without it. Their compiled
# parts are left out, and so is the search for a build of them.
KERNELS_FOLDER := .cache/triton-kernels
KERNELS := $(patsubst %,$(KERNELS_FOLDER)/%/.fetched,mamba-ssm/2.3.0 mamba-ssm/2.3.2.post1 \
  causal-conv1d/1.7.0 triton/3.7.1)
WITHOUT_CUDA := MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
  CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE

# lmms-eval, whose command tests run over our model class, and whose metrics they compare ours with. Of
# its dependencies those that the command imports.
LMMS_FOLDER := .cache/lmms-eval
LMMS := $(LMMS_FOLDER)/.fetched

# What the extra `web` adds, with the pillow that gradio takes: in front of the environment where a test
# shows the page of `chat --web`.
WEB := .cache/web/packages/.fetched

# What the extras `wandb` and `mlflow` add, whose own files tests read back.
SERVICES := .cache/services/packages/.fetched

# Beside the environment, each in a folder of its own.
define FETCH
if [ -n "$(UV)" ]; then pip="$(UV) pip install --python $(BIN)/python"; \
else pip="$(BIN)/python -m pip install --disable-pip-version-check --no-compile"; fi; \
fetch() { $(WITHOUT_CUDA) $$pip --quiet --no-deps --target $(@D) "$$@"; }
endef

# Tests run side by side, each process with ranks of its own. What a tier may cost is counted in
# seconds of processor time: on two cores half as long.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal
TEST_BUDGET_S := 1500
TEST_CI_BUDGET_S := 2000

.PHONY: install transformer-engine triton-kernels lmms-eval web-packages service-packages demo \
  demo-short demo-omni demo-omni-short test test-ci test-all test-faults lint docs bench bench-results clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Create .venv and install the package with its demo and dev extras

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@PYTHON="$(PYTHON)" UV="$(UV)" scripts/install.sh
	@touch $@

transformer-engine: $(TE)  ## Fetch the Python package that tests of GPU layers run (1 MB a version)

# Without an index all other tests run; those that need it say so.
$(TE_FOLDER)/%/.fetched: | $(INSTALLED)
	@$(FETCH); if fetch --only-binary :all: transformer-engine==$*; then touch $@; else \
	  echo "warning: transformer-engine $* was not fetched: tests over it will fail" >&2; fi

triton-kernels: $(KERNELS)  ## Fetch the kernels that tests run in Triton's interpreter (1 MB a version)

# Torch's build for CUDA brings it. (Before the next rule, which an old make would take for it.)
$(KERNELS_FOLDER)/triton/%/.fetched: $(INSTALLED)
	@mkdir -p $(@D)
	@$(FETCH); if $(BIN)/python -c 'import triton' 2>/dev/null || fetch --only-binary :all: triton==$*; \
	then touch $@; else \
	  echo "warning: triton $* was not fetched: tests of Triton kernels will fail" >&2; fi

# They come as sources only, and ask for torch when they are unpacked.
$(KERNELS_FOLDER)/%/.fetched: | $(INSTALLED)
	@$(FETCH); if fetch --no-build-isolation --no-binary :all: $(subst /,==,$*); then touch $@; else \
	  echo "warning: $(subst /, ,$*) was not fetched: tests of Triton kernels will fail" >&2; fi

lmms-eval: $(LMMS)  ## Fetch the evaluation harness that tests run (100 MB)

$(LMMS): tests/lmms/packages.txt | $(INSTALLED)
	@mkdir -p $(@D)
	@$(FETCH); if fetch --upgrade --only-binary :all: -r $<; then touch $@; else \
	  echo "warning: lmms-eval was not fetched: tests over it will fail" >&2; fi

web-packages: $(WEB)  ## Fetch what a test of the chat page runs (160 MB)

$(WEB): constraints-web.txt | $(INSTALLED)
	@rm -rf $(@D); $(FETCH); if fetch --only-binary :all: -r $<; then touch $@; else \
	  echo "warning: gradio was not fetched: the test of the chat page will fail" >&2; fi

service-packages: $(SERVICES)  ## Fetch W&B and MLflow, which tests record in (135 MB)

$(SERVICES): constraints-services.txt | $(INSTALLED)
	@rm -rf $(@D); $(FETCH); if fetch --only-binary :all: -r $<; then touch $@; else \
	  echo "warning: W&B and MLflow were not fetched: tests over them will fail" >&2; fi

demo: $(INSTALLED)  ## Train a small vision-language model on two grids, 4 ranks (about 5 minutes)
	@$(BIN)/megatron-mimo demo $(DEMO_FLAGS)

demo-omni: $(INSTALLED)  ## Train a small model on pictures, calls and videos, three grids, 4 ranks (about 6 minutes)
	@$(BIN)/megatron-mimo demo-omni $(DEMO_OMNI_FLAGS)

demo-omni-short: $(INSTALLED)  ## That demo for a few iterations: that it runs, not what it learns
	@$(BIN)/megatron-mimo demo-omni --train-iters 10 --num-train 500 --num-questions 28 \
	  --out runs/demo-omni-short $(DEMO_OMNI_FLAGS)

demo-short: $(INSTALLED)  ## The demo for a few iterations: that it runs, not what it learns
	@$(BIN)/megatron-mimo demo --train-iters 20 --out runs/demo-short $(DEMO_FLAGS)

test: $(INSTALLED) $(TE) $(KERNELS) $(LMMS) $(SERVICES)  ## Run the tests that find nearly everything (about 15 minutes on two cores)
	@$(PYTEST) -m "not slow" --processor-budget $(TEST_BUDGET_S) $(PYTEST_FLAGS)

test-ci: $(INSTALLED) $(TE) $(KERNELS) $(LMMS) $(WEB) $(SERVICES)  ## The same, and a slice of the slow ones: SLICE=3 asks for one
	@$(PYTEST) --slow-slice $(SLICE) --processor-budget $(TEST_CI_BUDGET_S) $(PYTEST_FLAGS)

test-all: $(INSTALLED) $(TE) $(KERNELS) $(LMMS) $(WEB) $(SERVICES)  ## Run every test, and properties on all their examples (for a release)
	@$(PYTEST) --hypothesis-profile full $(PYTEST_FLAGS)

test-faults: $(INSTALLED) $(TE) $(KERNELS) $(LMMS) $(WEB) $(SERVICES)  ## Plant faults one by one and see that the tests find them: FAULTS="NAME ..."
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
