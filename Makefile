# make        set up, run the main job (config.yaml), print the paper's two tables and write
#             results/index.html (everything on one page) and results/report.html (Snakemake's)
# make test   set up, then run the tests but for those that are slow by nature (.ci/run has them)
# make quick  the tests that run no workflow: between two commits
# make tables without torch or a model: all tables, figures and the page of the reference results
#             again, from the predictions that are kept there, and docs/images
# make full-length  a thousand and three thousand edits one after another (config/full-length.yaml):
#             days on one core; stop it at any time, the same command goes on
# Python: make PYTHON=python3.12

ifneq ($(words $(CURDIR)),1)
$(error The path of this folder, $(CURDIR), holds a blank, at which Snakemake's scripts fail: move it to one without)
endif

PYTHON ?= python3
VENV := .venv
EXTRAS ?= test
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SNAKEMAKE = PATH="$(abspath $(BIN)):$$PATH" snakemake --cores all

# What `make tables` makes again: a results folder, and the configs that it was made with. README.md
# shows a picture of the first.
EDITORS := reference/smollm2-135m-editors
REFERENCE ?= $(EDITORS)
CONFIGS ?= config/real.yaml config/reference/editors.yaml
REPORT_RULES := all metrics tables figures notebooks score table compare costs findings \
	node_importance figure notebook index

.PHONY: run test quick tables full-length clean

run: $(READY)
	$(SNAKEMAKE)
	$(SNAKEMAKE) --report results/report.html --quiet all

PYTEST = PATH="$(abspath $(BIN)):$$PATH" python -m pytest -n auto --dist loadgroup

MARKED ?= not slow

test: $(READY)
	$(PYTEST) -m "$(MARKED)"

quick: $(READY)
	$(PYTEST) -m "not slow and not integration"

tables: BIN := .venv-report/bin
tables: .venv-report/.ready
	$(SNAKEMAKE) --forceall --allowed-rules $(REPORT_RULES) --configfile $(CONFIGS) \
		--config 'pathvars={results: $(REFERENCE)}'
	$(if $(filter $(EDITORS),$(REFERENCE)),cp $(addprefix $(EDITORS)/figures/overview.,svg png) docs/images/)

# What is worth most comes first.
LONG := results/runs/smollm2-135m/zsre-long/consecutive
full-length: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" nice -n 19 snakemake --cores 1 --keep-going \
		--configfile config/real.yaml config/full-length.yaml \
		--prioritize $(foreach editor,pac alphaedit memit full-c,$(LONG)/$(editor)/default/seed0/predictions.parquet)

$(READY): constraints.txt pyproject.toml
	$(call venv,$(VENV),--editable '.[$(EXTRAS)]')

# The environment of the rules that run no model (envs/report.yaml), and Snakemake.
.venv-report/.ready: constraints.txt envs/report.yaml
	$(call venv,.venv-report,snakemake $$(sed -n 's/^ *- *\([A-Za-z0-9_.-]*==[^ ]*\)$$/\1/p' envs/report.yaml))

# Modules are compiled when they are first imported, which most never are.
define venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --no-compile --constraint constraints.txt $(2)
	touch $(1)/.ready
endef

clean:
	rm -rf $(VENV) .venv-report .snakemake logs
