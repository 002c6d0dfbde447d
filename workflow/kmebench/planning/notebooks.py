"""What notebooks are told, and the files that they read. Imports no torch.

One method for each notebook, which returns its parameters and its files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kmebench.modes import DEFAULT
from kmebench.planning import grid
from kmebench.planning.dependencies import code, source_closure, with_data
from kmebench.planning.wildcards import Wildcards

#: Notebooks by environment, each with the method that tells it: without torch, and with a model.
TABLE_NOTEBOOKS = {
    "01_dataset_tour": "dataset_tour",
    "03_paper_tables": "paper_tables",
    "04_ablations": "ablations",
    "05_compare_editors": "compared_editors",
}
MODEL_NOTEBOOKS = {
    "02_one_edit_under_the_microscope": "one_edit",
    "06_why_does_it_end": "ends_of_runs",
}
NOTEBOOKS = TABLE_NOTEBOOKS | MODEL_NOTEBOOKS
#: The method that notebook 02 looks at under the microscope.
_LOOKED_AT = "pac"

Told = tuple[dict[str, Any], list[str]]


@dataclass(frozen=True)
class Notebooks:
    """Inputs and parameters of the rules that execute notebooks, from a checked config."""

    config: Mapping[str, Any]
    results: str  # the folder that ``<results>`` stands for

    def inputs(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return a notebook, the files that it reads, and the code that it imports."""
        name = wildcards.notebook
        notebook = f"notebooks/{name}.ipynb"
        editors = []
        if NOTEBOOKS[name] == "one_edit":
            editors = [grid.card_of_method(self.config, _LOOKED_AT).module, "kmebench.api"]
        own = with_data(source_closure(notebook, *editors))
        return {
            "notebook": notebook,
            "files": list(dict.fromkeys(self._told(name)[1])),
            "code": sorted({*code("notebook"), *own}),
        }

    def parameters(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a notebook is told instead of the values of its cell ``parameters``."""
        return {"results": self.results} | self._told(wildcards.notebook)[0]

    def model(self) -> str:
        """Return the model of the notebooks that run one."""
        return self._first_model_and_datasets()[0]

    def _told(self, name: str) -> Told:
        told: Told = getattr(self, NOTEBOOKS[name])()
        return told

    def _main_experiment(self) -> str:
        """That of the paper's Table 2, or the first."""
        experiments = self.config["experiments"]
        return "table2" if "table2" in experiments else next(iter(experiments))

    def _first_model_and_datasets(self) -> tuple[str, list[str]]:
        """The first model of the main experiment, and its data sets."""
        spec = self.config["experiments"][self._main_experiment()]
        return spec["models"][0], spec["datasets"]

    def dataset_tour(self) -> Told:
        """Return the records of every data set, and what the unedited model says."""
        model, asked = self._first_model_and_datasets()
        datasets = list(dict.fromkeys(name.removesuffix(grid.DEVELOPMENT) for name in asked))
        files = [
            path
            for name in datasets
            for path in (
                f"<results>/data/{name}.jsonl",
                f"<results>/data/{name}.report.json",
                f"<results>/original/{model}/{name}.parquet",
            )
        ]
        statistics = self.config["statistics"]
        return {"model": model, "datasets": datasets, "statistics": statistics}, files

    def one_edit(self) -> Told:
        """Return a model, a data set, and how PAC edits."""
        config, (model, (dataset, *_)) = self.config, self._first_model_and_datasets()
        hparams = grid.base_hparams(config, model, _LOOKED_AT, "consecutive")
        parameters = {
            "model": model,
            "dataset": dataset,
            "hparams": dict(sorted(hparams.items())),
            "evaluation": config["evaluation"],
            **grid.load_of(config, model),
        }
        return parameters, [f"<results>/models/{model}", f"<results>/data/{dataset}.jsonl"]

    def ends_of_runs(self) -> Told:
        """Return consecutive runs of the main experiment, on its first model and data set."""
        config, (model, (dataset, *_)) = self.config, self._first_model_and_datasets()
        runs = {
            "/".join([run.method, run.variant, f"seed{run.seed}"]): run.folder()
            for run in grid.runs_of(config, self._main_experiment())
            if (run.pipeline, run.model, run.dataset) == ("consecutive", model, dataset)
        }
        configured = f"/{DEFAULT}/seed{config['seed']}"
        parameters = {
            "model": model,
            "dataset": dataset,
            "runs": {name.removesuffix(configured): path for name, path in runs.items()},
            "statistics": config["statistics"],
            **grid.load_of(config, model),
        }
        files = [f"<results>/models/{model}", f"<results>/data/{dataset}.jsonl"]
        read = ("predictions.parquet", "norms.parquet", "health.json")
        files += [f"<results>/{path}/{name}" for path in runs.values() for name in read]
        return parameters, files

    def paper_tables(self) -> Told:
        """Return the tables that have numbers of the paper beside them."""
        of_paper = {name: t for name, t in self.config["tables"].items() if "paper" in t}
        tables = {
            name: {key: spec[key] for key in ("experiment", "protocol", "paper")}
            for name, spec in sorted(of_paper.items(), key=lambda table: table[1]["paper"])
        }
        files = [f"<results>/tables/{name}.{kind}" for name in tables for kind in ("csv", "md")]
        for spec in tables.values():
            files += [f"<results>/metrics/{spec['experiment']}.parquet", spec["paper"]]
        return {"tables": tables}, files

    def ablations(self) -> Told:
        """Return the figures of sweeps and of nodes."""
        figures = self.config["figures"].items()
        sweeps = {
            name: {key: spec[key] for key in ("title", "experiment", "parameter")}
            | {"protocol": spec.get("protocol", "token")}
            for name, spec in figures
            if spec["kind"] == "sweep"
        }
        nodes = [name for name, spec in figures if spec["kind"] == "nodes"]
        files = [f"<results>/figures/{name}.csv" for name in [*sweeps, *nodes]]
        files += [f"<results>/metrics/{spec['experiment']}.parquet" for spec in sweeps.values()]
        return {"sweeps": sweeps, "nodes": nodes}, files

    def compared_editors(self) -> Told:
        """Return the runs of the main experiment."""
        experiment = self._main_experiment()
        runs = grid.runs_of(self.config, experiment)
        files = [f"<results>/{run.folder()}/predictions.parquet" for run in runs]
        parameters = {
            "experiment": experiment,
            "statistics": self.config["statistics"],
            "editors": {run.method: grid.editor_of(self.config, run.method) for run in runs},
        }
        return parameters, [f"<results>/metrics/{experiment}.parquet", *files]
