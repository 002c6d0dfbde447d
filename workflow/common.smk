"""What the rules share: inputs and parameters computed from the config. Holds no rule.

This file lies directly in workflow/ so that Snakemake puts that folder on sys.path: the
library is importable here, in scripts and in cluster jobs without being installed.
"""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from kmebench.editors.registry import editor_target
from kmebench.experiments import claims, grid
from kmebench.experiments.configuration import check_config
from kmebench.experiments.dependencies import source_closure

check_config(config, workflow.source_path("schemas/config.schema.yaml"))

RUNS = grid.all_runs(config)
TRAINED = [
    m for m, spec in config["models"].items() if spec["source"]["source"] == "tiny"
]
FETCHED = [m for m in config["models"] if m not in TRAINED]

#: What a path file is called (grid.selection_of).
SELECTION = r"\w+,[\w=]+,\w+,paths=\d+,negatives=\d+"
OPENFACTS = "resources/openfacts"
CLAIMS = "resources/paper/findings.yaml"
#: Templates of the pages that people read.
PAGES = sorted(
    str(path) for path in Path("workflow/kmebench/reporting/templates").glob("*.j2")
)


def openfacts_tables():
    """The fact tables of this repository."""
    return sorted(str(path) for path in Path(OPENFACTS, "facts").glob("*.csv"))


def openfacts_inputs(wildcards):
    """The fact tables, for a data set made of them."""
    if config["datasets"][wildcards.data]["source"]["source"] != "openfacts":
        return {}
    return {"relations": f"{OPENFACTS}/relations.json", "facts": openfacts_tables()}


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
    """The script of a rule with all library code it imports, and the pages that code fills in."""
    files = source_closure(f"workflow/scripts/{rule}.py", *modules)
    pages = [] if "workflow/kmebench/reporting/html.py" not in files else PAGES
    return [*files, *pages]


def run_at(wildcards, mode):
    """The run that a rule's wildcards name."""
    w = wildcards
    return grid.Run(w.model, w.dataset, mode, w.method, w.variant, int(w.seed))


def editor_module(run):
    return editor_target(grid.editor_of(config, run.method))[0]


def edit_inputs(mode):
    """An input function: what a run of this mode needs, and nothing that it does not."""

    def inputs(wildcards):
        run = run_at(wildcards, mode)
        needed = {
            "model": f"<results>/models/{run.model}",
            "requests": f"<results>/data/{run.dataset}.jsonl",
            "original": f"<results>/original/{run.model}/{run.dataset}.parquet",
            "code": code("edit", editor_module(run)),
        }
        if grid.needs_paths(config, run):
            selection = grid.selection_of(config, run)
            needed["paths"] = (
                f"<results>/trace/{run.model}/{run.dataset}/paths/{selection}.safetensors"
            )
        if grid.needs_moments(config, run):
            needed["moments"] = f"<results>/moments/{run.model}.safetensors"
        target = grid.target_of(config, run)
        if target:
            needed["targets"] = (
                f"<results>/targets/{run.model}/{run.dataset}/{target}.safetensors"
            )
        return needed

    return inputs


def edit_params(mode):
    """A parameter function: everything that decides the outcome of a run, as one dict."""

    def params(wildcards):
        run = run_at(wildcards, mode)
        return {
            "mode": mode,
            "editor": grid.editor_of(config, run.method),
            "hparams": grid.hparams_of(config, run),
            "seed": run.seed,
            "batch_size": config["batch_size"],
            "checkpoint_every": config["checkpoint_every"],
            "on_failed_edit": config["on_failed_edit"],
            "load": load_params(run.model),
            "evaluation": config["evaluation"],
        }

    return params


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


HAS_GPU = shutil.which("nvidia-smi") is not None


def experiment_files(name):
    """An input function: one file of every run of an experiment."""

    def files(wildcards):
        runs = grid.runs_of(config, wildcards.experiment)
        return [f"<results>/{run.folder()}/{name}" for run in runs]

    return files


def experiment_originals(wildcards):
    """(model, data set) of every unedited model that an experiment compares with."""
    runs = grid.runs_of(config, wildcards.experiment)
    return sorted({(run.model, run.dataset) for run in runs})


def comparison_folders(comparison):
    """The run folders that a comparison reads, each once."""
    sides = [run for _, *sides in grid.pairs_of(config, comparison) for run in sides]
    return sorted({run.folder() for run in sides})


def comparison_pairs(wildcards):
    """The pairs of a comparison, with the names that its table shows."""
    spec = config["comparisons"][wildcards.comparison]["pairs"]
    return [
        {
            "name": name,
            "question": spec[name]["question"],
            "model": labels("models", a.model)["label"],
            "dataset": labels("datasets", a.dataset)["label"],
            "a": a.folder(),
            "b": b.folder(),
        }
        for name, a, b in grid.pairs_of(config, wildcards.comparison)
    ]


def tuning_candidates(wildcards):
    """Every run of a sweep with the values it tries."""
    runs = grid.swept_runs(config, wildcards.experiment)
    return [asdict(run) | {"values": values} for run, values in runs]


def labels(section, name):
    """The names of a model, data set or method in tables: {label, paper_name}.

    A development split is not what the paper reports on, so it has no name there.
    """
    reported = name.removesuffix(grid.DEVELOPMENT)
    spec = config[section][reported] or {}
    label = spec.get("label", reported)
    if reported != name:
        return {"label": f"{label}, development split", "paper_name": None}
    return {"label": label, "paper_name": spec.get("paper_name")}


def table_params(wildcards):
    """What a table shows."""
    experiment = config["tables"][wildcards.table]["experiment"]
    spec = config["experiments"][experiment]

    def chosen(section):
        return {name: labels(section, name) for name in spec[section]}

    return {
        "title": config["tables"][wildcards.table]["title"],
        "protocol": config["tables"][wildcards.table]["protocol"],
        "mode": spec["mode"],
        "models": chosen("models"),
        "datasets": chosen("datasets"),
        "methods": chosen("methods"),
    }


def figure_runs(figure):
    """The runs that a figure shows, each with the value of the swept parameter."""
    spec = config["figures"][figure]
    parameter = spec.get("parameter")
    runs = []
    for run, values in grid.swept_runs(config, spec["experiment"]):
        known = {"seed": run.seed} | values
        runs.append((run, known[parameter] if parameter else grid.DEFAULT))
    # The nodes of a data set are the same whichever run asks for them.
    if spec["kind"] == "nodes":
        runs = [(run, value) for run, value in runs if grid.needs_paths(config, run)]
    return runs


def figure_files(wildcards):
    """The files that a figure is drawn from, in the order of its runs where it needs each."""
    spec = config["figures"][wildcards.figure]
    if spec["kind"] == "paper":
        return [f"<results>/tables/{table}.csv" for table in spec["tables"]]
    if spec["kind"] in ("sweep", "edits"):
        return [f"<results>/metrics/{spec['experiment']}.parquet"]
    runs = [run for run, _ in figure_runs(wildcards.figure)]
    if spec["kind"] == "nodes":
        return [
            f"<results>/trace/{run.model}/{run.dataset}/nodes/"
            f"{grid.selection_of(config, run)}.parquet"
            for run in runs
        ]
    name = {"time": "timing.json", "norms": "run.json"}[spec["kind"]]
    return [f"<results>/{run.folder()}/{name}" for run in runs]


def figure_params(wildcards):
    """What a figure shows."""
    spec = config["figures"][wildcards.figure]
    runs = [] if spec["kind"] == "paper" else figure_runs(wildcards.figure)
    return {
        **spec,
        "tables": [config["tables"][name]["title"] for name in spec.get("tables", [])],
        "protocol": spec.get("protocol", "token"),
        "runs": [asdict(run) | {"value": value} for run, value in runs],
        "labels": {
            section: {name: labels(section, name)["label"] for name in names}
            for section, names in (
                ("models", config["models"]),
                ("datasets", grid.datasets(config)),
                ("methods", config["methods"]),
            )
        },
    }


def finding_cells():
    """Where each claim of the paper can be tested, with the run folder (or path file) by role."""
    cells = []
    for claim in claims.read_claims(CLAIMS):
        for model, dataset, sides in claims.cells_of(config, claim):
            if claim.test["kind"] == "layers":
                selection = grid.selection_of(config, sides["pac"])
                files = {
                    "pac": f"trace/{model}/{dataset}/paths/{selection}.safetensors"
                }
            else:
                files = {role: run.folder() for role, run in sides.items()}
            cells.append(
                {
                    "claim": claim.id,
                    "model": labels("models", model)["label"],
                    "dataset": labels("datasets", dataset)["label"],
                    "sides": files,
                    "names": {role: side_name(run) for role, run in sides.items()},
                }
            )
    return cells


def side_name(run):
    """What readers see of a run that a claim is tested on."""
    name = labels("methods", run.method)["label"]
    return name if run.variant == grid.DEFAULT else f"{name}, {run.variant}"


def finding_files(name):
    """An input function: the files called ``name`` in the folders that claims are tested on."""

    def files(wildcards):
        paths = {side for cell in finding_cells() for side in cell["sides"].values()}
        return sorted(
            (
                f"<results>/{path}/{name}"
                if path.startswith("runs/")
                else f"<results>/{path}"
            )
            for path in paths
            if path.startswith("runs/") or name == "predictions.parquet"
        )

    return files


def default_runs():
    """The runs of the configured hyper-parameters and seed."""
    return [r for r in RUNS if (r.variant, r.seed) == (grid.DEFAULT, config["seed"])]


def run_labels(run):
    """What readers see of a run."""
    return {
        "model": labels("models", run.model)["label"],
        "dataset": labels("datasets", run.dataset)["label"],
        "mode": run.mode,
        "editor": labels("methods", run.method)["label"],
    }


def table_paths():
    """Every table and comparison but the findings, as a path below results without its ending."""
    paths = [f"tables/{name}" for name in [*config["tables"], "costs"]]
    return paths + [f"comparisons/{name}" for name in config["comparisons"]]


def results_folder():
    """Where results go: ``results``, unless the config moves it (pathvars)."""
    return str(workflow.pathvars.get("results"))


def main_experiment():
    """The experiment that notebooks look into: that of the paper's Table 2, or the first."""
    experiments = config["experiments"]
    return "table2" if "table2" in experiments else next(iter(experiments))


def first_model_and_datasets():
    """The first model of the main experiment, and its data sets."""
    spec = config["experiments"][main_experiment()]
    return spec["models"][0], spec["datasets"]


# What each notebook is told, and the files that it reads.


def dataset_tour():
    model, datasets = first_model_and_datasets()
    datasets = list(
        dict.fromkeys(name.removesuffix(grid.DEVELOPMENT) for name in datasets)
    )
    files = [
        path
        for name in datasets
        for path in (
            f"<results>/data/{name}.jsonl",
            f"<results>/data/{name}.report.json",
            f"<results>/original/{model}/{name}.parquet",
        )
    ]
    statistics = config["statistics"]
    return {"model": model, "datasets": datasets, "statistics": statistics}, files


def one_edit():
    model, (dataset, *_) = first_model_and_datasets()
    parameters = {
        "model": model,
        "dataset": dataset,
        "hparams": dict(sorted(grid.base_hparams(config, model, "pac").items())),
        "seed": config["seed"],
        "evaluation": config["evaluation"],
        **load_params(model),
    }
    return parameters, [f"<results>/models/{model}", f"<results>/data/{dataset}.jsonl"]


def paper_tables():
    tables = {
        name: {key: spec[key] for key in ("experiment", "protocol", "paper")}
        for name, spec in sorted(
            config["tables"].items(), key=lambda table: table[1].get("paper", "")
        )
        if "paper" in spec
    }
    files = [
        f"<results>/tables/{name}.{kind}" for name in tables for kind in ("csv", "md")
    ]
    for spec in tables.values():
        files += [f"<results>/metrics/{spec['experiment']}.parquet", spec["paper"]]
    return {"tables": tables}, files


def ablations():
    kinds = {
        kind: {n: f for n, f in config["figures"].items() if f["kind"] == kind}
        for kind in ("sweep", "nodes")
    }
    sweeps = {
        name: {key: spec[key] for key in ("title", "experiment", "parameter")}
        | {"protocol": spec.get("protocol", "token")}
        for name, spec in kinds["sweep"].items()
    }
    files = [
        f"<results>/figures/{name}.csv"
        for of_kind in kinds.values()
        for name in of_kind
    ]
    files += [
        f"<results>/metrics/{spec['experiment']}.parquet" for spec in sweeps.values()
    ]
    return {"sweeps": sweeps, "nodes": list(kinds["nodes"])}, files


def compared_editors():
    experiment = main_experiment()
    runs = grid.runs_of(config, experiment)
    files = [f"<results>/{run.folder()}/predictions.parquet" for run in runs]
    parameters = {"experiment": experiment, "statistics": config["statistics"]}
    return parameters, [f"<results>/metrics/{experiment}.parquet", *files]


#: Notebooks by environment: without torch, and with a model.
TABLE_NOTEBOOKS = {
    "01_dataset_tour": dataset_tour,
    "03_paper_tables": paper_tables,
    "04_ablations": ablations,
    "05_compare_editors": compared_editors,
}
MODEL_NOTEBOOKS = {"02_one_edit_under_the_microscope": one_edit}


def notebook_settings(wildcards):
    return (TABLE_NOTEBOOKS | MODEL_NOTEBOOKS)[wildcards.notebook]()


def notebook_inputs(wildcards):
    """An input function: a notebook, the files that it reads, and the code that it imports."""
    notebook = f"notebooks/{wildcards.notebook}.ipynb"
    editors = ["kmebench.editors.pac"] if wildcards.notebook in MODEL_NOTEBOOKS else []
    return {
        "notebook": notebook,
        "files": list(dict.fromkeys(notebook_settings(wildcards)[1])),
        "code": sorted({*code("notebook"), *source_closure(notebook, *editors)}),
    }


def notebook_parameters(wildcards):
    """What a notebook is told instead of the values of its cell ``parameters``."""
    return {"results": results_folder()} | notebook_settings(wildcards)[0]


def print_tables():
    """Show the finished tables of the paper on the terminal, and say where the rest is."""
    results = Path(results_folder())
    papers = [name for name, spec in config["tables"].items() if "paper" in spec]
    made = [results / "tables" / f"{name}.md" for name in papers]
    made += [results / "comparisons" / f"{name}.md" for name in config["comparisons"]]
    for path in made:
        if path.is_file():
            print(f"\n{path.read_text(encoding='utf-8')}\n[{path}]")
    page = results / "index.html"
    if page.is_file():
        print(f"\nAll tables, figures and findings on one page: {page}")
