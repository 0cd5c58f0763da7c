# Every target makes the environment by itself on first use. `make help` lists them.
PROFILE ?= quick
PYTHON  ?= python3
BIN     := .venv/bin
COURSE  := $(BIN)/python -m helpers

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test figures notebooks report bench lab

help:       ## this list
	@grep -hE '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

# The stamp is newer than pyproject.toml when the environment is complete, so nothing is installed twice.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is needed: set PYTHON=")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (about 7 GB with CUDA's libraries; minutes, once) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

setup: .venv/installed      ## make .venv with everything the course needs

reproduce: .venv/installed  ## run every notebook end to end into out/<profile>/ (PROFILE=quick | recorded | paper)
	$(COURSE) reproduce --profile $(PROFILE)

# Two files at a time, one thread each: two threads each would be slower on two cores. In the order of the files: by
# default xdist starts files with few tests last, and the longest of these would run alone at the end.
test: .venv/installed       ## the whole test suite: units, notebooks, figures, faults
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

figures: .venv/installed    ## regenerate figures/ and every table in Markdown from the recorded runs; no data, no GPU
	$(COURSE) figures

notebooks: .venv/installed  ## run the committed notebooks once (profile recorded) and store their outputs
	$(COURSE) notebooks

report: .venv/installed     ## the whole course as one HTML page, out/report.html; runs nothing, needs no network
	$(COURSE) report

bench: .venv/installed      ## measure this machine
	$(COURSE) bench

lab: .venv/installed        ## open the course in JupyterLab (LAB="--allow-root --no-browser --port 9000" for a server)
	$(BIN)/jupyter lab $(LAB) --notebook-dir=. notebooks/00_start_here.ipynb
