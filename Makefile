# Every target builds the environment that it needs, of the versions in constraints.txt (torch) and pins.txt (the rest).
# To change what it is built from:
#   PYTHON=python3.12          the interpreter that makes the environment
#   LATEST=1                   the newest releases instead of pins.txt; deprecations are then no errors
#   OLDEST=1                   the oldest torch and transformers that are supported (pins-oldest.txt)
#   WITH=transformers==5.23.0  one more requirement, for LATEST=1
#   TORCH=torch==2.14.0        another torch than the pinned one (constraints.txt is then left aside)
#   VENV=/tmp/venv             where the environment lies; VENV= (empty): none, $(PYTHON) is used as it is
#   VENV_FLAGS=--system-site-packages TORCH=   build on the torch that $(PYTHON) already has
#   MARK="gpu or not gpu"      which tests (a pytest -m expression)
#   JOBS=14                    test processes; two by default, for two cores
#   ARGS="-x -k lifting"       more arguments for pytest, or for the demo
# A machine with a GPU, everything installed and no network: make test VENV= MARK="gpu or not gpu"
PYTHON ?= python3
LATEST ?=
OLDEST ?=
WITH ?=
VENV ?= .venv$(if $(LATEST),-latest)$(if $(OLDEST),-oldest)
VENV_FLAGS ?=
MARK ?= not gpu
JOBS ?= 2
ARGS ?=

ifneq ($(OLDEST),)
PINS := pins-oldest.txt
else
PINS := constraints.txt $(if $(LATEST),,pins.txt)
endif
TORCH ?= $(shell sed -n '/^torch==/p' $(firstword $(PINS)))

ifeq ($(VENV),)
PY := $(PYTHON)
CLI := $(PYTHON) -c "from omnisparse_flex.cli import main; raise SystemExit(main())"
needs =
else
PY := $(VENV)/bin/python
CLI := $(VENV)/bin/omnisparse-flex
needs = $(VENV)/.has-$(1)
endif

# The pins hold for whatever pip resolves later, in its isolated build environments too: an unpinned "torch" of some
# package would bring gigabytes of CUDA. The paths are relative because pip splits the variables at spaces.
HELD := $(strip $(if $(filter file,$(origin TORCH)),$(PINS),$(filter-out constraints.txt,$(PINS))))
PIP := $(if $(HELD),PIP_CONSTRAINT="$(HELD)" PIP_BUILD_CONSTRAINT="$(HELD)") $(PY) -m pip

# What third parties deprecate next is not our error before we move our pins.
DEPRECATIONS := DeprecationWarning PendingDeprecationWarning FutureWarning
WARNINGS := $(if $(LATEST),$(foreach kind,$(DEPRECATIONS),-W default::$(kind)))

.PHONY: demo test lint docs fuzz house bench bench-gpu lock clean

demo: $(call needs,demo)
	$(CLI) demo $(ARGS)

test: $(call needs,test)
	HYPOTHESIS_PROFILE=ci $(PY) -m pytest -n $(JOBS) --dist worksteal -p no:benchmark $(WARNINGS) -m "$(MARK)" $(ARGS)

lint: $(call needs,lint) docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Random calls and modules against what they mean: make fuzz MINUTES=30; on a GPU: make fuzz KINDS=gpu VENV=
MINUTES ?= 5
KINDS ?= calls modules
fuzz: $(call needs,test)
	$(PY) -m tests.fuzz.fuzz_run $(KINDS) --minutes $(MINUTES) $(ARGS)

# A warning is an error: links to pages, headings and files that are not there, docstrings that Sphinx cannot read.
docs: $(call needs,docs)
	$(PY) -m sphinx -q -W --keep-going -b html docs site
	@echo "site/index.html"

# The tree in figures: files a folder, lengths, import arrows, public names.
house: $(call needs,test)
	$(PY) -m benchmarks.common.house $(ARGS)

bench: $(call needs,bench)
	$(PY) -m pytest benchmarks -m "not gpu" $(ARGS)

bench-gpu: $(call needs,bench)
	$(PY) -m benchmarks.common.run_gpu $(ARGS)

# resolve(constraints, packages to leave out); where uv fails, grep finds no line, and so fails too.
define resolve
{ echo "# Made by \`make lock\`: edit pyproject.toml and run that."; \
  $(LOCK_VENV)/bin/uv pip compile -q --universal --python-version 3.10 --no-annotate --no-header -c $(1) \
    $(foreach extra,$(EXTRAS),--extra $(extra)) pyproject.toml | grep -vE '^($(2))=='; }
endef

# Both files are resolved for every Python from the oldest on, for all that the targets install, against the package
# index alone. Torch and the CUDA packages that its wheel for Linux names are left to constraints.txt.
LOCK_VENV ?= .venv-lock
# All of them, but for the one that is for GPUs alone.
EXTRAS = $(filter-out flash,$(shell sed -n '/optional-dependencies/,/^\[project.scripts/s/^\([a-z]*\) = .*/\1/p' pyproject.toml))
lock:
	test -x $(LOCK_VENV)/bin/python || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install -q --upgrade uv
	sed -n 's/.*"\(torch\|transformers\)>=\([0-9.]*\)".*/\1==\2.0/p' pyproject.toml > $(LOCK_VENV)/oldest.txt
	$(call resolve,constraints.txt,torch|triton|nvidia-[^=]*|cuda-[^=]*) > $(LOCK_VENV)/pins.txt
	$(call resolve,$(LOCK_VENV)/oldest.txt,triton|nvidia-[^=]*|cuda-[^=]*) > $(LOCK_VENV)/pins-oldest.txt
	mv $(LOCK_VENV)/pins.txt $(LOCK_VENV)/pins-oldest.txt .

clean:
	rm -rf .venv .venv-latest .venv-oldest .venv-lock build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf benchmarks/scratch omnisparse_masks.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by its exact version: so pip takes a CPU wheel where its configuration offers one.
$(VENV)/.has-torch: $(PINS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(PIP) install -q $(TORCH))
	touch $@

# One stamp per extra: `make demo` does not wait for the linters, and a second call waits for nothing.
$(VENV)/.has-%: $(VENV)/.has-torch pyproject.toml
	$(PIP) install -q -e ".[$*]" $(WITH)
	touch $@
