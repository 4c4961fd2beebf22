# Every target works in a fresh clone: it first creates .venv if that is missing or out of date.
#   make demo ARGS="--requests 60 --report report.json"
#   HEMOSTAT_VLLM=vllm make setup     on a machine with a CUDA GPU
#   TORCH_INDEX_URL=... make setup    if uv does not find PyTorch's CPU build

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ARGS ?=

# Some machines forbid byte code on disk. Then each process compiles all of its modules again: vLLM's server takes 13 s of
# processor time to import in place of 6, and the demo starts several such processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-versions test-newest test-oldest passed lint bench-proxy bench-alarm bench-floor bench-families bench-bounds bench-engine bench-recovery bench-reference bench-guard bench-gate bench-coverage bench-faults bench-load bench-spool bench-canaries bench-compress bench-growth bench-demo bench-mutants bench-gpu chart dist docs site screenshot clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

setup: ## create .venv with Hemostat, vLLM (CPU build), PyTorch and the tools
	@test -n "$(PYTHON)" || { echo "Hemostat needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) deploy/setup/environment.py

demo: setup ## Hemostat in front of a real vLLM with a quantized model; ARGS="...": options of `hemostat demo`
	@exec $(BIN)/hemostat demo $(ARGS)

lint: setup ## run ruff, mypy (strict), the import contracts and the check of the language
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/language.py

# One thread per process: with more threads than processors, the threads wait for each other in every small
# matrix product (a test of five seconds took two minutes). Three processes on two processors: a third of the time of
# tests that start processes is spent waiting for them.
test: lint ## lint, then all tests but the slow ones, also on a real vLLM; ARGS="...": options of pytest (-n 0: not in parallel)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 3 --no-loadscope-reorder $(ARGS) || \
		{ code=$$?; $(BIN)/python deploy/setup/passed.py; exit $$code; }

test-slow: setup ## only the tests that take minutes each (a promotion on a real vLLM, ...); run them before a release
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 0 --slow $(ARGS)

test-versions: setup ## the tests that use vLLM, with other versions of it (up to an hour each); writes build/versions.json
	@exec $(BIN)/python deploy/setup/versions.py $(ARGS)

test-newest: setup ## without vLLM, in an environment with the newest versions that pyproject.toml allows; before each landing
	@exec $(BIN)/python deploy/setup/bounds.py newest $(ARGS)

test-oldest: setup ## the same with the oldest versions
	@exec $(BIN)/python deploy/setup/bounds.py oldest $(ARGS)

passed: setup ## after `make test` has passed: write deploy/setup/passed/engine.txt, the installed versions
	@$(BIN)/python deploy/setup/passed.py --write

bench-proxy: setup ## requests/s and CPU compared with nginx and vllm-router; writes build/bench/proxy.json
	@exec $(BIN)/python tests/bench/bench_proxy.py $(ARGS)

bench-alarm: setup ## tokens until a changed model is detected, and false alarms; writes build/bench/alarm.json
	@exec $(BIN)/python tests/bench/bench_alarm.py $(ARGS)

bench-floor: setup ## the noise floor: divergence of each model from itself; writes build/bench/floor.json
	@exec $(BIN)/python tests/bench/bench_floor.py $(ARGS)

bench-families: setup ## what equal bits cost two families of models; downloads Gemma-3-270M; writes build/bench/families.json
	@exec $(BIN)/python tests/bench/bench_families.py $(ARGS)

bench-bounds: setup ## bounds from top-K lists compared with the full vocabulary; writes build/bench/bounds.json and .svg
	@exec $(BIN)/python tests/bench/bench_bounds.py $(ARGS)

bench-recovery: setup ## divergence recovered by calibration, in the real engine (hours); writes build/bench/recovery.json
	@exec $(BIN)/python tests/bench/bench_recovery.py $(ARGS)

bench-reference: setup ## a reference on vLLM compared with the one in process; writes build/bench/reference.json
	@exec $(BIN)/python tests/bench/bench_reference.py $(ARGS)

bench-engine: setup ## cost of profiles, sets of grammars and adapters in vLLM's decoding; writes engine.json, grammars.json, adapters.json
	@$(BIN)/python tests/bench/bench_engine.py $(ARGS)
	@$(BIN)/python tests/bench/bench_grammars.py
	@exec $(BIN)/python tests/bench/bench_adapters.py $(ARGS)

bench-guard: setup ## simulations of what the guard, alarm, intervals and outcomes guarantee; writes build/bench/guard.json
	@exec $(BIN)/python tests/bench/bench_guard.py $(ARGS)

bench-gate: setup ## error rates of the gate in simulated worlds, and the prompts that it takes; writes build/bench/gate.json
	@exec $(BIN)/python tests/bench/bench_gate.py $(ARGS)

bench-coverage: setup ## share of a mixed agent workload that is scored, and why the rest is not; writes build/bench/coverage.json
	@exec $(BIN)/python tests/bench/bench_coverage.py $(ARGS)

bench-faults: setup ## attacks, faults and restarts under load, on real processes; writes build/bench/faults.json
	@exec $(BIN)/python tests/bench/bench_faults.py $(ARGS)

bench-load: setup ## what one control process takes from its relays, and its load at 10 to 10^6 requests/s; writes build/bench/load.json
	@exec $(BIN)/python tests/bench/bench_load.py $(ARGS)

bench-spool: setup ## what a spool costs: rate of scoring later, bytes a token, 12 hours without a reference; writes build/bench/spool.json
	@exec $(BIN)/python tests/bench/bench_spool.py $(ARGS)

bench-canaries: setup ## what canaries find on a real vLLM: changed weights, caches, kernels, and nothing (hours); writes build/bench/canaries.json
	@exec $(BIN)/python tests/bench/bench_canaries.py $(ARGS)

bench-compress: setup ## compressed checkpoints of equal bytes, ours and llmcompressor's (hours); writes build/bench/compress.json
	@exec $(BIN)/python tests/bench/bench_compress.py $(ARGS)

bench-growth: setup ## how time and memory of each part grow, with fitted exponents; writes build/bench/growth.json
	@exec $(BIN)/python tests/bench/bench_growth.py $(ARGS)

bench-demo: setup ## five demos on a quiet machine: requests and seconds until the promotion, and their medians; writes build/bench/demo/
	@exec $(BIN)/python tests/bench/bench_demo.py $(ARGS)

bench-mutants: setup ## do the tests find changes of the product, and reversed fixes (hours); ARGS="--mutants 300 --reversals 40"
	@exec $(BIN)/python tests/bench/bench_mutants.py $(ARGS)

bench-gpu: setup ## on a machine with a GPU and vLLM: what only that can tell, in ten minutes; writes build/bench/gpu.json
	@exec $(BIN)/python tests/bench/bench_gpu.py $(ARGS)

chart: setup ## generate the versions, the README and the values schema of helm/hemostat, and the tested versions everywhere
	@$(BIN)/python deploy/tested.py
	@$(BIN)/python deploy/chart.py

dist: setup ## sources, wheels, chart, images, SBOM and checksums, in build/dist; ARGS="--build-arg BASE=...": of the images
	@exec $(BIN)/python deploy/setup/dist.py $(ARGS)

docs: setup ## generate docs/reference/ from the code, and the console's runbook page from docs/runbook.md
	@$(BIN)/python deploy/reference.py
	@$(BIN)/python deploy/runbook.py

site: setup ## the documentation as a site, in build/site; a broken link is an error
	@exec $(BIN)/python deploy/site.py

screenshot: setup ## write pictures of the console in every tested state to docs/console; other ones to build/console: ARGS="--dark --width 400 --page kinds"
	@exec $(BIN)/python deploy/screenshot.py $(ARGS)

clean: ## remove .venv and everything that was built here (checkpoints stay in the user's cache)
	rm -rf .venv build dist .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find middleware calibration tests -name __pycache__ -type d -prune -exec rm -rf {} +
