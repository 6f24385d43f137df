# Everything runs in .venv, which `make` sets up from pyproject.toml.
PYTHON ?= python3
# One known release first; torchvision's newest may still replace it by what it asks for. Override
# for your CUDA build.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/demo
	$(BIN)/nrm demo --out demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile

bench: .venv/dev
	$(BIN)/python benchmarks/lrp_pass.py --json lrp_pass.json

.venv/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

.venv/demo: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

.venv/dev: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ .venv/demo

clean:
	rm -rf .venv demo
