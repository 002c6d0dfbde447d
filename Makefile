# make        set up, run the main job (config.yaml), print the paper's two tables and write
#             results/index.html (everything on one page) and results/report.html (Snakemake's)
# make test   set up, then run the tests
# Python: make PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test clean

run: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" snakemake --cores all
	PATH="$(abspath $(BIN)):$$PATH" snakemake --report results/report.html --quiet all

test: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" python -m pytest -n auto

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) .snakemake logs
