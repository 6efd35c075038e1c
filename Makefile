# `make demo`, `make test` and `make lint` work on a fresh machine: each first makes what it needs of a virtual
# environment, and does so again only when a requirements file has changed.
#   make demo PYTHON=python3.12     use another interpreter (3.10 or newer)
#   make demo VENV=/tmp/venv        keep the environment elsewhere
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadscope --no-loadscope-reorder

.PHONY: help demo test test-long lint gpu
help:
	@echo "make demo       train, merge and draw results/demo.png (a few minutes)"
	@echo "make test       run the test suite"
	@echo "make test-long  run what it leaves out: the exhaustive tests, marked long"
	@echo "make lint       run ruff"
	@echo "make gpu        what a GPU makes of it all, in 25 minutes: gpu_results/report.md"

demo: $(VENV)/.installed
	$(RUN) demo.py

test: $(VENV)/.installed-dev
	$(PYTEST)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long

gpu: $(VENV)/.installed
	$(RUN) -m benchmarks.gpu

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("DIMAT needs Python 3.10 or newer and \
	$(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install -q -r requirements-dev.txt
	@touch $@
