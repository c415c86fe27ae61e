# Every target builds the environment that it needs. To change what it is built from:
#   PYTHON=python3.12          the interpreter that makes the environment
#   VENV=/tmp/venv             where the environment lies; VENV= (empty): none, $(PYTHON) is used as it is
#   VENV_FLAGS=--system-site-packages TORCH=   build on the torch that $(PYTHON) already has
#   TORCH=torch==2.11.0        another torch than the pinned one (constraints.txt is then left aside)
#   MARK="gpu or not gpu"      which tests (a pytest -m expression)
#   JOBS=14                    test processes; two by default, for two cores
#   ARGS="-x -k lifting"       more arguments for pytest, or for the demo
# A machine with a GPU, everything installed and no network: make test VENV= MARK="gpu or not gpu"
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
TORCH ?= $(strip $(shell cat constraints.txt))
MARK ?= not gpu
JOBS ?= 2
ARGS ?=

ifeq ($(VENV),)
PY := $(PYTHON)
CLI := $(PYTHON) -c "from omnisparse_flex.cli import main; raise SystemExit(main())"
needs =
else
PY := $(VENV)/bin/python
CLI := $(VENV)/bin/omnisparse-flex
needs = $(VENV)/.has-$(1)
endif

# The pin holds for whatever pip resolves later, in its isolated build environments too: an unpinned "torch" of some
# package would bring gigabytes of CUDA. The path is relative because pip splits the variable at spaces.
PIP := $(if $(filter file,$(origin TORCH)),PIP_CONSTRAINT=constraints.txt) $(PY) -m pip

.PHONY: demo test lint bench bench-gpu clean

demo: $(call needs,demo)
	$(CLI) demo $(ARGS)

test: $(call needs,test)
	HYPOTHESIS_PROFILE=ci $(PY) -m pytest -n $(JOBS) --dist worksteal -p no:benchmark -m "$(MARK)" $(ARGS)

lint: $(call needs,lint)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(call needs,bench)
	$(PY) -m pytest benchmarks -m "not gpu" $(ARGS)

bench-gpu: $(call needs,bench)
	$(PY) -m benchmarks.common.run_gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf benchmarks/scratch omnisparse_masks.png omnisparse_stats.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by its exact version: so pip takes a CPU wheel where its configuration offers one.
$(VENV)/.has-torch: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(PIP) install -q $(TORCH))
	touch $@

# One stamp per extra: `make demo` does not wait for the linters, and a second call waits for nothing.
$(VENV)/.has-%: $(VENV)/.has-torch pyproject.toml
	$(PIP) install -q -e ".[$*]"
	touch $@
