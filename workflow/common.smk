"""What the rules share: inputs and parameters computed from the config. Holds no rule.

This file lies directly in workflow/ so that Snakemake puts that folder on sys.path: the
library is importable here, in scripts and in cluster jobs without being installed.
"""

import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from kmebench.io import origins
from kmebench.editors.needs import Covariance, Paths, Targets
from kmebench.planning import grid
from kmebench.planning.config import check_config
from kmebench.planning.dependencies import source_closure
from kmebench.planning.interpreter import check_interpreter
from kmebench.planning.overlays import read_overlay

for configfile_path in workflow.configfiles:
    read_overlay(configfile_path)  # refuses a key that stands twice; Snakemake does not
check_config(config, workflow.source_path("schemas/config.schema.yaml"))
check_interpreter(sys.executable)

RUNS = grid.all_runs(config)
TRAINED = [
    m for m, spec in config["models"].items() if spec["source"]["source"] == "tiny"
]
FETCHED = [m for m in config["models"] if m not in TRAINED]

#: What a path file is called (grid.selection_of).
SELECTION = r"\w+\+[\w=]+\+\w+\+paths=\d+\+negatives=\d+"
OPENFACTS = "resources/openfacts"
REPORTING = "workflow/kmebench/reporting"
MIRROR = config["data_mirror"] or os.environ.get("KMEBENCH_DATA_MIRROR", "")


def openfacts_tables():
    """The fact tables of this repository."""
    return sorted(str(path) for path in Path(OPENFACTS, "facts").glob("*.csv"))


def openfacts_inputs(wildcards):
    """The fact tables, for a data set made of them."""
    if config["datasets"][wildcards.data]["source"]["source"] != "openfacts":
        return {}
    return {"relations": f"{OPENFACTS}/relations.json", "facts": openfacts_tables()}


def users_data_file(dataset):
    """The user's own file in the mirror folder, which a data set is taken from."""
    source = config["datasets"][dataset]["source"]
    return origins.mirror_file(source.get("filenames", []), MIRROR)


def data_content(wildcards):
    """A parameter function: the content of the user's data file, unless the config pins it."""
    pinned = "sha256" in config["datasets"][wildcards.data]["source"]
    file = None if pinned else users_data_file(wildcards.data)
    return origins.parameter(
        file, f"{results_folder()}/data/raw/{wildcards.data}.origin.json"
    )


def model_content(wildcards):
    """A parameter function: the content of the user's folder, for a model that is one."""
    source = config["models"][wildcards.model]["source"]
    note = f"{results_folder()}/models/{wildcards.model}/{origins.NOTE}"
    return origins.parameter(source.get("path"), note)


def text_content(wildcards):
    """A parameter function: the content of the user's text, if the covariance is taken over one."""
    note = f"{results_folder()}/covariance/{wildcards.model}.origin.json"
    return origins.parameter(config["covariance"]["text"].get("path"), note)


def selection_params(dataset):
    """What prepare_dataset selects from a data set."""
    spec = config["datasets"][dataset]
    keys = (
        "schema",
        "n",
        "seed",
        "segments",
        "development",
        "conflicts",
        "on_bad_record",
    )
    return {key: spec[key] for key in keys if key in spec}


def one_of(names):
    """A wildcard constraint: one of a closed list of names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def code(rule, *modules):
    """The script of a rule with all library code it imports."""
    return with_data(source_closure(f"workflow/scripts/{rule}.py", *modules))


def with_data(files):
    """Add the files that library code reads as its own: page templates, the style of figures."""
    beside = {"html.py": "templates/*.j2", "figures.py": "*.mplstyle"}
    found = [
        str(path)
        for name, pattern in beside.items()
        if f"{REPORTING}/{name}" in files
        for path in Path(REPORTING).glob(pattern)
    ]
    return sorted({*files, *found})


def run_at(wildcards, mode):
    """The run that a rule's wildcards name."""
    w = wildcards
    return grid.Run(w.model, w.dataset, mode, w.method, w.variant, int(w.seed))


def edit_inputs(mode):
    """An input function: what a run of this mode needs, and nothing that it does not."""

    def inputs(wildcards):
        run = run_at(wildcards, mode)
        return {
            "model": f"<results>/models/{run.model}",
            "requests": f"<results>/data/{run.dataset}.jsonl",
            "original": f"<results>/original/{run.model}/{run.dataset}.parquet",
            "code": code("edit", grid.card_of_method(config, run.method).module),
        } | {
            need.asset: f"<results>/{need.path(run.model, run.dataset)}"
            for need in grid.needs_of(config, run)
        }

    return inputs


def edit_params(mode):
    """A parameter function: everything that decides the outcome of a run, as one dict."""

    def params(wildcards):
        run = run_at(wildcards, mode)
        return {
            "mode": mode,
            "editor": config["methods"][run.method].get("editor", run.method),
            "hparams": grid.hparams_of(config, run),
            "seed": run.seed,
            "batch_size": config["batch_size"],
            "checkpoint_every": config["checkpoint_every"],
            "on_failed_edit": config["on_failed_edit"],
            "on_bad_record": on_bad_record(wildcards),
            "load": load_params(run.model),
            "evaluation": config["evaluation"],
        }

    return params


def on_bad_record(wildcards):
    """What becomes of requests of a data set that cannot be used, or are too long for a model."""
    spec = config["datasets"][wildcards.dataset.removesuffix(grid.DEVELOPMENT)]
    return spec.get("on_bad_record", "error")


def asked_params(wildcards):
    """Which requests tracing and targets leave out: the same as predictions.

    Where none may be left out, predictions refuse what is too long, and how long answers may be
    concerns them alone.
    """
    answer = on_bad_record(wildcards)
    wild = config["evaluation"]["wild_max_tokens"] if answer == "skip" else 0
    return {"wild_max_tokens": wild, "on_bad_record": answer}


def load_params(model):
    """How a model is loaded."""
    spec = config["models"][model]
    return {"dtype": spec["dtype"], "device": spec.get("device", config["device"])}


def gpus(wildcards):
    """GPUs a job asks for."""
    return gpus_of(wildcards.model)


def gpus_of(model):
    """One GPU, unless the model runs on the CPU."""
    device = load_params(model)["device"]
    return int(device not in ("auto", "cpu") or (device == "auto" and HAS_GPU))


def memory(wildcards, attempt):
    """Main memory in MB that a job with a model asks for; more after a failure."""
    return memory_of(wildcards.model, attempt)


def memory_of(model, attempt):
    """3 GB for Python, torch and the results, and twice the weights."""
    spec = config["models"][model]
    parameters = spec.get("shape", {}).get("parameters", 5e8)
    return attempt * int(3000 + 2 * parameters * grid.BYTES[spec["dtype"]] / 1e6)


def minutes(wildcards, attempt):
    """Time that a job with a model asks for: half a day, and more after a failure.

    An edit run that takes longer saves what it has done, and its retry goes on.
    """
    return attempt * 720


HAS_GPU = shutil.which("nvidia-smi") is not None


def results_folder():
    """Where results go: ``results``, unless the config moves it (pathvars)."""
    return str(workflow.pathvars.get("results"))
