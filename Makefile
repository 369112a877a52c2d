# rlzero: `make demo` trains a small model and shows the result, `make test` runs the tests. Both set themselves up in
# .venv and do nothing twice. They need Python 3.11+, make, a C/C++ compiler and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# uv does not read pip's settings, so those that say where packages lie are handed on to it.
pip_setting = $(strip $(shell $(PYTHON) -m pip config get global.$(1) 2>/dev/null))
empty :=
comma := ,
space := $(empty) $(empty)
ifeq ($(UV_FIND_LINKS),)
  UV_FIND_LINKS := $(subst $(space),$(comma),$(strip $(or $(PIP_FIND_LINKS),$(call pip_setting,find-links))))
endif
ifeq ($(UV_DEFAULT_INDEX),)
  UV_DEFAULT_INDEX := $(or $(PIP_INDEX_URL),$(call pip_setting,index-url))
endif
ifneq ($(UV_DEFAULT_INDEX),)
  export UV_DEFAULT_INDEX
endif
# A folder of packages is expected to hold the CPU build of torch; without one, uv takes that build from its own index.
ifneq ($(UV_FIND_LINKS),)
  export UV_FIND_LINKS
  TORCH_BUILD :=
else
  TORCH_BUILD := --torch-backend cpu
endif
INSTALL := $(UV) install --quiet --python $(BIN)/python --overrides requirements/overrides.txt $(TORCH_BUILD)

# uv leaves packages uncompiled. Where this is set, as many images do, each of a run's processes would compile torch and
# Ray anew when it starts: seconds.
export PYTHONDONTWRITEBYTECODE :=

export OMP_NUM_THREADS ?= $(CORES)
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo setup test test-quick test-setup test-gpu requirements lint clean

help:
	@echo "make demo      set up, train the demo on this machine's CPU, write its report (minutes)"
	@echo "make test      set up, run the tests"
	@echo "make test-quick  of these, the ones that start no runs and no engines: a contributor's loop (3 minutes)"
	@echo "make test-gpu  run the tests that need a Hopper GPU, in the Python that is active"
	@echo "make setup     only create $(VENV) with the rlzero command"

# Done twice it shows the first result again; `rm -r runs/demo` to train anew. The base it starts from is shipped in
# configs/demo-base; `rlzero pretrain configs/demo-base.yaml` makes it again.
demo: $(VENV)/.core
	@echo "== training with reinforcement learning (configs/demo.yaml)"
	$(BIN)/rlzero train configs/demo.yaml --resume

setup: $(VENV)/.core

test-setup: $(VENV)/.test

test: test-setup
	$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)

test-quick: test-setup
	$(BIN)/python -m pytest -m "not gpu and not slow and not long" $(ARGS)

test-gpu:
	python -m pytest -m gpu $(ARGS)

lint: test-setup
	$(BIN)/ruff check .

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(VENV)/.core: $(VENV)/.created requirements/cpu.txt requirements/overrides.txt pyproject.toml
	@echo "== installing what rlzero needs (requirements/cpu.txt, about 1 GB)"
	@$(INSTALL) -r requirements/cpu.txt
	@$(INSTALL) --no-deps --editable .
	@echo "== compiling the torch engine's kernels"
	@$(BIN)/python -m rollout.torch.native.library
	@touch $@

$(VENV)/.test: $(VENV)/.core requirements/test.txt
	@echo "== installing what the tests need, the CPU build of vLLM among it (requirements/test.txt, about 2 GB)"
	@$(INSTALL) -r requirements/test.txt
	@touch $@

requirements: $(VENV)/.created
	UV=$(BIN)/uv requirements/compile.sh

clean:
	rm -rf $(VENV) build dist *.egg-info
