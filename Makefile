# SpotServe. `make` alone prints this help.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-external check chaos invariance soak bench bench-engine bench-recut bench-replay clean

help: ## print this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## make .venv with everything that is needed

demo: setup ## a local cluster under load while a trace takes its machines away; the report is in runs/demo
	$(BIN)/spotserve demo --out runs/demo

# Files of tests that start no system of processes go two at a time; the others want the machine to themselves.
define run_tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(1) --numprocesses 2 --dist loadfile --ignore tests/system
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(1) tests/system
endef

test: setup ## every test (the short chaos test included)
	$(call run_tests,)

test-external: setup ## tests against a real vLLM; SPOTSERVE_VLLM_PYTHON names an interpreter that has it (docs/engines.md)
	$(BIN)/python -m pytest -m external

check: setup ## what every commit passes: format, lint, types, contracts, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(call run_tests,-q)

chaos: setup ## the long chaos test: 200 preemptions and more under 300 streams and more
	SPOTSERVE_CHAOS=long $(BIN)/python -m pytest -m chaos -s --timeout 3600

invariance: setup ## the long form of the invariance tests: 200 random mixes of each kind, 24 layers at the 0.5 B shape
	SPOTSERVE_INVARIANCE=long $(BIN)/python -m pytest tests/engine/test_engine_arithmetic.py --timeout 3600

soak: setup ## 10,000 short requests with cancels, evictions, prefix hits and re-cuts; what is left behind
	$(BIN)/python benchmarks/soak.py

bench-recut: setup ## cutting the model anew against stopping and starting it
	$(BIN)/python benchmarks/recut.py

bench-engine: setup ## this engine beside its peers; set PEERS to name their interpreters
	$(BIN)/python benchmarks/bench_engine.py $(PEERS)

bench-replay: setup ## our controller beside the published policies, on the traces of the paper; SPOTSERVE_DATA names the data
	$(BIN)/python benchmarks/paper.py
	$(BIN)/python benchmarks/bench_replay.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/replay_speed.py

bench: setup ## the benchmarks of benchmarks/README.md, one after the other
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python benchmarks/checkpoint_cost.py
	$(BIN)/python benchmarks/gateway_stream.py

clean: ## remove what the other targets made
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
