# make demo   an environment, the model and the data if needed, then: accuracy before, LoRA, accuracy after, verify
# make test   ruff, mypy and every test
# Nothing but Python 3.11 to 3.13 is needed. On Linux, torch's usual build brings CUDA along (3 GB); for the small build
# for CPUs let pip's own configuration name it, or: make TORCH=path/to/torch.whl demo
PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
DEMO_ARGS ?=
TEST_ARGS ?=
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
# An environment is made again when what it was made from has changed, whatever the files' dates say.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
USED := $(VENV)/.ready-$(KEY)
TESTED := $(VENV)/.ready-test-$(KEY)

.DELETE_ON_ERROR:
.PHONY: demo test lint venv clean

demo: $(USED)
	$(PY) -m tunesmith demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist=worksteal $(TEST_ARGS)

lint: $(TESTED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

venv: $(USED)

$(PY):
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Tunesmith needs Python 3.11 to 3.13, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and by itself: a build that pip's own configuration names (a CPU wheel, a mirror) is then taken as it is.
$(USED): | $(PY)
	@echo 'Installing torch and what else is needed into $(VENV): once, a few minutes'
	$(PY) -m pip install --disable-pip-version-check -qq -c constraints.txt '$(TORCH)'
	$(PY) -m pip install --disable-pip-version-check -qq -c constraints.txt -e .
	@touch $@

$(TESTED): $(USED)
	$(PY) -m pip install --disable-pip-version-check -qq -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build
