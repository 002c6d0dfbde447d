# make        set up, then run the main job (config.yaml) and print the paper's two tables
# make test   set up, then run the tests
# Python: make PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test clean

run: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" snakemake --cores all

test: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" python -m pytest -n auto

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) .snakemake logs
