# Everything runs in .venv, which `make` sets up from pyproject.toml.
PYTHON ?= python3
# Named together with everything else, so that pip chooses versions that fit. Override it for
# another release: `make test TORCH=torch==2.14.1`.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo quick test docs links mutants bench versions clean

demo: .venv/demo
	$(BIN)/nrm demo --out demo

# The oracle, formulas, the measure, rules: those of their tests that take three networks.
quick: .venv/dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m quick

test: .venv/dev versions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --dist loadfile

# The site in docs/_build/html. Warnings are errors, and words that are often misspelt are looked for.
docs: .venv/dev
	$(BIN)/codespell
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "The site is docs/_build/html/index.html."

# Whether the addresses that pages point to answer: needs a network.
links: .venv/dev
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

# Changes that the tests have to notice, one at a time in a copy of the tree: an hour or more.
mutants: .venv/dev
	$(BIN)/python tests/mutation.py

bench: .venv/dev
	$(BIN)/python benchmarks/lrp_pass.py --json lrp_pass.json

versions:
	@$(BIN)/python .ci/versions.py

.venv/demo: pyproject.toml
	$(call set_up,demo)
	touch $@

.venv/dev: pyproject.toml
	$(call set_up,dev)
	touch $@ .venv/demo

# Installed before, but with another torch than is asked for now: install again.
ifneq ($(TORCH),$(shell cat .venv/torch 2>/dev/null))
.PHONY: .venv/demo .venv/dev
endif

# One pip call for all. What was cut short (Ctrl-C, no network) starts anew, from pip's cache.
define set_up
	@echo "Setting up .venv: $(TORCH) and nrm[$(1)]. This takes some minutes and 2 GB, with CUDA 6.5 GB."
	@if test -e .venv/unfinished; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/unfinished
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)" --editable ".[$(1)]"
	@$(BIN)/python .ci/versions.py
	@echo "$(TORCH)" > .venv/torch && rm .venv/unfinished
endef

clean:
	rm -rf .venv demo
