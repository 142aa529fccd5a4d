# Two commands do everything on a fresh machine: `make demo` and `make test`.
#
# All paths are relative and every tool runs as `python -m`: a folder with a space in its name breaks a venv's
# scripts and make's lists of words, but not these.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
CHECK_VERSION := import sys; sys.exit("troodon needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types tests format tables pages pictures docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: .venv/base  ## install, then run the whole system on a small made world; ends with the page to open
	$(PY) -m troodon.cli demo --out demo
	@find demo -maxdepth 1 -name '*.html' -exec printf 'Open in a browser: %s/%s\n' "$$PWD" {} ';'

test: lint types tests  ## install, then lint, type check and test

lint: .venv/dev  ## style and common mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: .venv/dev  ## type check
	$(PY) -m pyrefly check --python-interpreter-path $(PY)

# One thread for each test process: they run beside one another.
tests: .venv/dev  ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8

format: .venv/dev  ## rewrite the code in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

tables: .venv/base  ## make the tables of README.md and docs/performance.md from benchmarks/results
	$(PY) benchmarks/tables.py

pages: .venv/base  ## make docs/recipes.md and docs/troubles.md from the code
	$(PY) docs/recipes.py
	$(PY) -m tests.troubles

pictures: .venv/base  ## make the pictures of the pages, in some minutes
	$(PY) docs/pictures.py

docs: .venv/docs  ## build the pages into site/
	$(PY) -m zensical build --clean --strict
	@echo 'To read them, with search: $(PY) -m http.server --directory site 8000, and open http://127.0.0.1:8000'

clean:  ## remove what the commands above made, the environment included
	rm -rf .venv demo site build dist .pytest_cache .ruff_cache .hypothesis

# The environment, in layers; each file is the time its layer was last put in place.
# torch goes first and by itself: any other request for it may fetch gigabytes of CUDA libraries beside it.
.venv/torch: constraints.txt
	@"$(PYTHON)" -c '$(CHECK_VERSION)'
	"$(PYTHON)" -m venv .venv
	@echo 'Installing torch: minutes the first time, nothing afterwards'
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/base: .venv/torch pyproject.toml
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/base
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/docs: .venv/base
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
