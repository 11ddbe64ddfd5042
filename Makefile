# `make demo` and `make test` need nothing but python3 and make: they make .venv themselves.
PYTHON ?= python3

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
# mypy and import-linter do not follow package-dir in an editable install,
# so they look at a copy that is installed here, from here.
LINTED := $(CURDIR)/build/linted
# The same for mkdocstrings.
DOCUMENTED := $(CURDIR)/build/documented

# Where the case studies' data are, as docs/cases.md says, and what else to tell them: CASE="--quick".
SPEECH_DATA ?= data/free-spoken-digit-dataset/recordings
IMAGE_DATA ?= /usr/share/datasets/fashion-mnist
LANGUAGE_DATA ?= data/sentence_polarity
CASE ?=
CASES := case-speech case-speech-transformer case-image case-language case-dates

.DEFAULT_GOAL := help
.PHONY: help install demo test test-faults lint format check docs notebooks dist clean \
	$(CASES) $(CASES:%=%-full) case-tables

help:
	@echo "make demo    search a small network's compression, and show the front"
	@echo "make test    all tests but those marked minutes"
	@echo "make test-faults  drivers and workers killed again and again; a quarter of an hour"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  ruff's formatter and its safe fixes"
	@echo "make check   lint and test"
	@echo "make docs    the site, into build/site, strictly"
	@echo "make notebooks  run the notebooks"
	@echo "make dist    sdist and wheel, checked"
	@echo "make $(CASES)"
	@echo "             a case study, from a fresh network to figures; CASE=--quick for a small one"
	@echo "make case-speech-full, ...  what one would do instead too, three seeds; hours"
	@echo "make case-tables  the tables of cases in README and docs, from cases/results"
	@echo "make clean   remove all that make made"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo,bayesian,optuna,huggingface,nas,nsga3,dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/pytest -m "not minutes" --numprocesses 2

test-faults: $(INSTALLED)
	$(BIN)/pytest tests/faults tests/cluster

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(PIP) --no-deps --no-build-isolation --target $(LINTED) .
	cd $(LINTED) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package ray_nascomp
	cd $(LINTED) && $(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

check: lint test

docs: $(INSTALLED)
	$(PIP) --editable ".[docs]"
	rm -rf build/lib build/documented build/site
	$(PIP) --no-deps --no-build-isolation --target $(DOCUMENTED) .
	cd docs && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file $(CURDIR)/mkdocs.yml --site-dir $(CURDIR)/build/site

notebooks: $(INSTALLED)
	$(PIP) --editable ".[docs,demo]"
	$(BIN)/python notebooks/run.py

case-speech case-speech-full case-speech-transformer case-speech-transformer-full: DATA = $(SPEECH_DATA)
case-image case-image-full: DATA = $(IMAGE_DATA)
case-language case-language-full: DATA = $(LANGUAGE_DATA)
case-dates case-dates-full: DATA = .

$(CASES): $(INSTALLED)
	$(BIN)/python cases/run.py $(subst -,_,$(@:case-%=%)) --data $(DATA) $(CASE)

$(CASES:%=%-full): $(INSTALLED)
	$(BIN)/python cases/run.py $(subst -,_,$(@:case-%-full=%)) --data $(DATA) --full --seeds 0 1 2 $(CASE)

case-tables: $(INSTALLED)
	$(BIN)/python cases/tables.py $(wildcard cases/results/*.json) --earlier $(wildcard cases/results/earlier/*.json) \
		--into README.md docs/cases.md

dist: $(INSTALLED)
	$(PIP) --editable ".[release]"
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
