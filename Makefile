# fedpeft needs Python 3.11, 3.12 or 3.13 and make. Everything else goes into .venv, once: an
# installation is repeated only when pyproject.toml or constraints.txt changed.

VENV := .venv
BIN := $(VENV)/bin
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test slow lint types contracts docs check audit sbom vulnerabilities wheel \
	clean

help:
	@echo 'make quickstart   install, then run the first federation and print its table'
	@echo 'make test         install, then run the test suite'
	@echo 'make slow         the slow tests'
	@echo 'make check        lint, types, import contracts, doctests'
	@echo 'make audit        hold what is installed to the pins; no network'
	@echo 'make sbom         write the bill of materials (CycloneDX) into dist/'
	@echo 'make vulnerabilities   ask an advisory database about the pins; needs a network'
	@echo 'make wheel        build into dist/ and check the wheel in a clean environment'
	@echo 'make clean        remove .venv, caches and build products (runs/ stays)'

quickstart: $(VENV)/.installed
	$(BIN)/fedpeft run quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/python -m mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/.installed-test
	$(BIN)/python -m pytest --doctest-modules fedpeft

check: lint types contracts docs

audit: $(VENV)/.installed-dev
	$(BIN)/python .ci/dependencies.py audit

sbom: $(VENV)/.installed-dev
	$(BIN)/python .ci/dependencies.py sbom dist

# In an environment of its own, as pip-audit is no dependency of fedpeft's. A package that the database
# does not know is a failure too (--strict).
vulnerabilities:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install -qq --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

wheel: $(VENV)/.installed-dev
	$(BIN)/python .ci/check_wheel.py dist

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's own script is the last thing that venv makes, so a half-made environment is made again.
$(BIN)/pip:
	@test -n '$(PYTHON)' || { echo 'fedpeft needs Python 3.11, 3.12 or 3.13 with its venv module,' \
		'and found none. Name one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing into $(VENV) (2 GB, a few minutes the first time) ...'
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing into $(VENV) (2 GB, a few minutes the first time) ...'
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing into $(VENV) (2 GB, a few minutes the first time) ...'
	$(INSTALL) -e '.[test,dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
