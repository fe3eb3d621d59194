# `make demo` and `make test` set everything up by themselves; `make setup` alone does only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
D2 := .detectron2

.PHONY: setup demo test test-detectron2 test-slow lint clean

setup: $(STAMP)

# Python itself makes the environment; uv, from PyPI, fills it several times faster than pip does.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dfm_d2 needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# One process a core, each of one thread: a file's tests stay together, with what they share.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The tests that compare with the real Detectron2, which lies in a folder of its own: the environment stays without it.
test-detectron2: $(D2)/.installed
	DFM_REQUIRE_D2=1 PYTHONPATH=$(CURDIR)/$(D2) $(BIN)/python -m pytest -m 'd2 and not gpu and not slow'

# The wheel says that it is for Python 3.10, because of its compiled part; that is not needed, and does not load.
$(D2)/.installed: tests/framework/requirements.txt | $(STAMP)
	rm -rf $(D2)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(D2) --require-hashes --no-deps --no-compile \
		--python-version 3.10 --implementation cp --abi none --platform any -r tests/framework/requirements.txt
	rm $(D2)/detectron2/_C.*
	@touch $@

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(D2) output data/shapes build *.egg-info
