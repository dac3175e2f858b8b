# Two commands do everything on a fresh machine: make run, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0

RUN_MODEL := smollm2-135m
RUN_BUDGET := 3.25bpw
# Evaluations end the search, so that it ends the same everywhere; the clock only where these take too long.

.PHONY: run test lint test-slow test-embedded test-all bench-solvers bench-searches bench-compressing bench-rows bench-rows-quality bench-spaces bench-influence \
  bench-measuring bench-streaming bench-anchors bench-anchors-full schema clean

run: $(STAMP)
	$(BIN)/allocator search $(RUN_MODEL) --space bits --budget $(RUN_BUDGET) --trials 250 --time 15m \
	  --name demo-$$(date +%Y%m%d-%H%M%S)

# One thread in each of two processes: the tests' models are tiny, and threads would only wait for
# each other. A file's tests stay together, for they share models and runs.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-embedded: $(STAMP)
	$(BIN)/python -m pytest -m embedded

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

bench-solvers: $(STAMP)
	$(BIN)/python tests/benchmarks/solvers.py

bench-searches: $(STAMP)
	$(BIN)/python tests/benchmarks/searches_synthetic.py

bench-compressing: $(STAMP)
	$(BIN)/python tests/benchmarks/compressing.py

bench-rows: $(STAMP)
	$(BIN)/python tests/benchmarks/rows.py

bench-rows-quality: $(STAMP)
	$(BIN)/python tests/benchmarks/rows_quality.py

bench-measuring: $(STAMP)
	$(BIN)/python tests/benchmarks/measuring.py

bench-anchors: $(STAMP)
	$(BIN)/python tests/benchmarks/anchors/run.py --profile small

bench-anchors-full: $(STAMP)
	$(BIN)/python tests/benchmarks/anchors/run.py --spaces bits gptq sparsity joint --seeds 0 1 2 3 4

bench-spaces: $(STAMP)
	$(BIN)/python tests/benchmarks/spaces.py

bench-influence: $(STAMP)
	$(BIN)/python tests/benchmarks/influence.py

bench-streaming: $(STAMP)
	$(BIN)/python tests/benchmarks/streaming.py

schema: $(STAMP)
	$(BIN)/python -c "import json; from allocator.plan import plan_json_schema; print(json.dumps(plan_json_schema(), indent=1))" > allocator/plan.schema.json

$(STAMP): pyproject.toml requirements/constraints.txt requirements/embedded.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[dev,gguf,postgresql,torchao]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/embedded.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
