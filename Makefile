PYTHON ?= python3
OUT ?= runs/demo
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help install demo test check bench peers soak format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     the whole road, from a generated web to a served caption, into $(OUT)"
	@echo "make install  .venv with everything but the developers' tools"
	@echo "make test     the test suite"
	@echo "make check    format, lint, types, then the tests (what CI runs)"
	@echo "make bench    the benchmarks, others beside us"
	@echo "make peers    .venv-open-clip and .venv-img2dataset, for the benchmarks against them"
	@echo "make soak     the long kill, fuzz and chaos runs"
	@echo "make format   format and fix what can be fixed"
	@echo "make clean    remove caches and build leftovers (keeps .venv and runs)"

install: .venv/installed-all

demo: .venv/installed-all
	$(BIN)/coca demo --out $(OUT)

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: .venv/installed-dev peers
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

peers: .venv-open-clip/installed .venv-img2dataset/installed

.venv-open-clip/installed: benchmarks/peers/requirements.txt .venv/installed-dev
	$(BIN)/python -m venv --clear .venv-open-clip
	.venv-open-clip/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt
	@touch $@

.venv-img2dataset/installed: benchmarks/peers/img2dataset-requirements.txt .venv/installed-dev
	$(BIN)/python -m venv --clear .venv-img2dataset
	.venv-img2dataset/bin/python -m pip install --quiet --disable-pip-version-check \
		-r benchmarks/peers/img2dataset-requirements.txt
	@touch $@

soak: .venv/installed-dev
	$(BIN)/python -m pytest -m soak

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Installed again only when the requirements change.
.venv/installed-all: pyproject.toml constraints.txt
	.ci/create-venv "$(PYTHON)"
	@echo "installing into .venv (some minutes the first time)"
	$(PIP_INSTALL) -e '.[all]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	.ci/create-venv "$(PYTHON)"
	@echo "installing into .venv (some minutes the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/installed-all $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
