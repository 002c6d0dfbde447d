"""What notebooks are told, and the files that they read. Holds no rule.

One function for each notebook, which returns its parameters and its files.
"""


def main_experiment():
    """The experiment that notebooks look into: that of the paper's Table 2, or the first."""
    experiments = config["experiments"]
    return "table2" if "table2" in experiments else next(iter(experiments))


def first_model_and_datasets():
    """The first model of the main experiment, and its data sets."""
    spec = config["experiments"][main_experiment()]
    return spec["models"][0], spec["datasets"]


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
    hparams = grid.base_hparams(config, model, "pac", "consecutive")
    parameters = {
        "model": model,
        "dataset": dataset,
        "hparams": dict(sorted(hparams.items())),
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
NOTEBOOKS = TABLE_NOTEBOOKS | MODEL_NOTEBOOKS

for name in config.setdefault("notebooks", sorted(NOTEBOOKS)):
    grid.check_name(name, NOTEBOOKS, "notebooks", "notebooks")


def notebook_settings(wildcards):
    return NOTEBOOKS[wildcards.notebook]()


def notebook_inputs(wildcards):
    """An input function: a notebook, the files that it reads, and the code that it imports."""
    notebook = f"notebooks/{wildcards.notebook}.ipynb"
    editors = ["kmebench.editors.pac.pac"] if wildcards.notebook in MODEL_NOTEBOOKS else []
    return {
        "notebook": notebook,
        "files": list(dict.fromkeys(notebook_settings(wildcards)[1])),
        "code": sorted(
            {*code("notebook"), *with_data(source_closure(notebook, *editors))}
        ),
    }


def notebook_parameters(wildcards):
    """What a notebook is told instead of the values of its cell ``parameters``."""
    return {"results": results_folder()} | notebook_settings(wildcards)[0]
