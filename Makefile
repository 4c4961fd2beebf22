# Everything from a clean clone: each target first makes .venv if it is missing or out of date.
#   make demo ARGS="--requests 60 --report report.json"
#   HEMOSTAT_VLLM=vllm make setup     on a machine with a CUDA GPU
#   TORCH_INDEX_URL=... make setup    where pip does not find PyTorch's CPU build by itself

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench-proxy bench-alarm bench-floor bench-bounds bench-engine bench-recovery chart docs screenshot clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

setup: ## make .venv: Hemostat, vLLM (CPU build), PyTorch, tools
	@test -n "$(PYTHON)" || { echo "Hemostat needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) deploy/setup/environment.py

demo: setup ## real vLLM, a real quantized model, Hemostat in front; ARGS="..." for `hemostat demo`
	@exec $(BIN)/hemostat demo $(ARGS)

lint: setup ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a process: with more threads than processors, they wait for each other in every small product (a test of
# five seconds took two minutes).
test: lint ## lint, types, and all tests, on a real vLLM; ARGS="..." for pytest (-n 0: one after the other)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 2 --no-loadscope-reorder $(ARGS)

test-slow: setup ## the tests that take minutes each (a promotion on a real vLLM, ...), to be run before a release
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 0 --slow $(ARGS)

bench-proxy: setup ## requests/s and CPU beside nginx and vllm-router; a table and build/bench/proxy.json
	@exec $(BIN)/python tests/bench/bench_proxy.py $(ARGS)

bench-alarm: setup ## tokens until a changed model is noticed, and false alarms; a table and build/bench/alarm.json
	@exec $(BIN)/python tests/bench/bench_alarm.py $(ARGS)

bench-floor: setup ## how far each model is from itself; a table and build/bench/floor.json
	@exec $(BIN)/python tests/bench/bench_floor.py $(ARGS)

bench-bounds: setup ## what cut lists leave open, against the whole vocabulary; a table, build/bench/bounds.json and .svg
	@exec $(BIN)/python tests/bench/bench_bounds.py $(ARGS)

bench-recovery: setup ## what calibration wins back, through the real engine (hours); a table and build/bench/recovery.json
	@exec $(BIN)/python tests/bench/bench_recovery.py $(ARGS)

bench-engine: setup ## what a contextual profile costs vLLM's decoding; a table and build/bench/engine.json
	@exec $(BIN)/python tests/bench/bench_engine.py $(ARGS)

chart: setup ## write the generated files of helm/hemostat: its README and the schema of `config`
	@$(BIN)/python deploy/chart.py

docs: setup ## write docs/metrics.md from the code, and the console's runbook page from docs/runbook.md
	@$(BIN)/python deploy/metrics.py
	@$(BIN)/python deploy/runbook.py

screenshot: setup ## a picture of the console over a run of the demo (15 minutes), docs/console.png; ARGS="--scored 700"
	@exec $(BIN)/python deploy/screenshot.py $(ARGS)

clean: ## remove .venv and all that was built here (the checkpoints stay in the user's cache)
	rm -rf .venv build dist .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find middleware calibration tests -name __pycache__ -type d -prune -exec rm -rf {} +
