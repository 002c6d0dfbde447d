"""What the rules that report read and are told: metrics, tables, figures. Imports no torch.

As in :mod:`kmebench.planning.inputs`, rules name methods as functions of the wildcards.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kmebench.editors.needs import Paths
from kmebench.modes import DEFAULT
from kmebench.planning import claims, grid
from kmebench.planning.appearance import Style, styles
from kmebench.planning.captions import caption
from kmebench.planning.wildcards import Wildcards

CLAIMS = "resources/paper/findings.yaml"
Files = Callable[[Wildcards], list[str]]


@dataclass(frozen=True)
class Reported:
    """Inputs and parameters of the rules that report, from a checked config."""

    config: Mapping[str, Any]
    results: str  # the folder that ``<results>`` stands for

    # -- experiments ----------------------------------------------------------------------------

    def run_files(self, name: str) -> Files:
        """Return an input function: one file of every run of an experiment."""

        def files(wildcards: Wildcards) -> list[str]:
            runs = grid.runs_of(self.config, wildcards.experiment)
            return [f"<results>/{run.folder()}/{name}" for run in runs]

        return files

    def health_files(self, wildcards: Wildcards) -> list[str]:
        """Return the measurements of every run of an experiment, if its pipeline makes any."""
        mode = self.config["experiments"][wildcards.experiment]["mode"]
        measured = grid.measures_health(self.config, mode)
        return self.run_files("health.json")(wildcards) if measured else []

    def runs(self, wildcards: Wildcards) -> list[dict[str, Any]]:
        """Return every run of an experiment."""
        return [asdict(run) for run in grid.runs_of(self.config, wildcards.experiment)]

    def originals(self, wildcards: Wildcards) -> list[dict[str, str]]:
        """Return model and data set of every unedited model that an experiment compares with."""
        runs = grid.runs_of(self.config, wildcards.experiment)
        pairs = sorted({(run.model, run.dataset) for run in runs})
        return [{"model": model, "dataset": dataset} for model, dataset in pairs]

    def original_files(self, wildcards: Wildcards) -> list[str]:
        """Return the predictions of these."""
        return [
            "<results>/original/{model}/{dataset}.parquet".format(**original)
            for original in self.originals(wildcards)
        ]

    def candidates(self, wildcards: Wildcards) -> list[dict[str, Any]]:
        """Return every run of a sweep with the values it tries."""
        runs = grid.swept_runs(self.config, wildcards.experiment)
        return [asdict(run) | {"values": values} for run, values in runs]

    def tuned_mode(self, wildcards: Wildcards) -> str | None:
        """Return the mode that a sweep tunes alone; None where its values hold in all."""
        spec = self.config["experiments"][wildcards.experiment]
        return spec["mode"] if spec["tunes"] == "mode" else None

    # -- names ----------------------------------------------------------------------------------

    def labels(self, section: str, name: str) -> dict[str, str | None]:
        """Return the names of a model, data set or method in tables: label, paper_name.

        A development split is not what the paper reports on, so it has no name there.
        """
        reported = name.removesuffix(grid.DEVELOPMENT)
        spec = self.config[section][reported]
        label = spec.get("label", reported)
        if reported != name:
            return {"label": f"{label}, development split", "paper_name": None}
        return {"label": label, "paper_name": spec.get("paper_name")}

    def label(self, section: str, name: str) -> str:
        """Return the name of a model, data set or method in tables."""
        return str(self.labels(section, name)["label"])

    def _run_label(self, run: grid.Run) -> str:
        """What readers see of a run that a claim is tested on."""
        name = self.label("methods", run.method)
        return name if run.variant == DEFAULT else f"{name}, {run.variant}"

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How every method looks in figures and on the page, by its label."""
        cards = {m: grid.card_of_method(self.config, m) for m in self.config["methods"]}
        return {self.label("methods", m): style for m, style in styles(cards).items()}

    # -- comparisons ----------------------------------------------------------------------------

    def comparison_folders(self, wildcards: Wildcards) -> list[str]:
        """Return the run folders that a comparison reads, each once."""
        pairs = grid.pairs_of(self.config, wildcards.comparison)
        return sorted({run.folder() for _, *sides in pairs for run in sides})

    def comparison_files(self, wildcards: Wildcards) -> list[str]:
        """Return the predictions in these folders."""
        folders = self.comparison_folders(wildcards)
        return [f"<results>/{folder}/predictions.parquet" for folder in folders]

    def comparison_pairs(self, wildcards: Wildcards) -> list[dict[str, str]]:
        """Return the pairs of a comparison, with the names that its table shows."""
        spec = self.config["comparisons"][wildcards.comparison]["pairs"]
        return [
            {
                "name": name,
                "question": spec[name]["question"],
                "model": self.label("models", a.model),
                "dataset": self.label("datasets", a.dataset),
                "a": a.folder(),
                "b": b.folder(),
            }
            for name, a, b in grid.pairs_of(self.config, wildcards.comparison)
        ]

    # -- tables ---------------------------------------------------------------------------------

    def table_metrics(self, wildcards: Wildcards) -> str:
        """Return the metrics that a table shows."""
        return f"<results>/metrics/{self.config['tables'][wildcards.table]['experiment']}.parquet"

    def table(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a table shows."""
        shown = self.config["tables"][wildcards.table]
        spec = self.config["experiments"][shown["experiment"]]
        return {
            "title": shown["title"],
            "protocol": shown["protocol"],
            "mode": grid.mode_of(spec),
            "controls": grid.controls(self.config),
        } | {
            section: {name: self.labels(section, name) for name in spec[section]}
            for section in ("models", "datasets", "methods")
        }

    @cached_property
    def table_paths(self) -> list[str]:
        """Every table and comparison but the findings, below results and without its ending."""
        paths = [f"tables/{name}" for name in [*self.config["tables"], "costs"]]
        return paths + [f"comparisons/{name}" for name in self.config["comparisons"]]

    @cached_property
    def default_runs(self) -> list[grid.Run]:
        """The runs of the configured hyper-parameters and seed."""
        default = (DEFAULT, self.config["seed"])
        return [r for r in grid.all_runs(self.config) if (r.variant, r.seed) == default]

    @cached_property
    def default_labels(self) -> list[dict[str, str]]:
        """What readers see of these."""
        return [
            {
                "model": self.label("models", run.model),
                "dataset": self.label("datasets", run.dataset),
                "mode": run.mode,
                "editor": self.label("methods", run.method),
            }
            for run in self.default_runs
        ]

    # -- figures --------------------------------------------------------------------------------

    def figure_files(self, wildcards: Wildcards) -> list[str]:
        """Return the files that a figure is drawn from, in the order of its runs."""
        spec = self.config["figures"][wildcards.figure]
        if spec["kind"] in ("paper", "sizes"):
            return [f"<results>/tables/{table}.csv" for table in spec["tables"]]
        if spec["kind"] in ("sweep", "edits"):
            return [f"<results>/metrics/{spec['experiment']}.parquet"]
        if spec["kind"] in ("overview", "cost"):
            return [f"<results>/metrics/{name}.parquet" for name in spec["experiments"]]
        runs = [run for run, _ in grid.figure_runs(self.config, spec)]
        if spec["kind"] in ("nodes", "layers"):
            paths = [(run, grid.needed(self.config, run, Paths)) for run in runs]
            files = [
                f"<results>/{need.path(run.model, run.dataset)}" for run, need in paths if need
            ]
            return files if spec["kind"] == "layers" else [_nodes(path) for path in files]
        name = "timing.json" if spec["kind"] == "time" else "norms.parquet"
        return [f"<results>/{run.folder()}/{name}" for run in runs]

    def figure(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a figure shows."""
        config, spec = self.config, self.config["figures"][wildcards.figure]
        return {
            **spec,
            "caption": self.caption(wildcards.figure),
            "tables": [config["tables"][name]["title"] for name in spec.get("tables", [])],
            **(self._sizes(spec) if spec["kind"] == "sizes" else {}),
            "paper_names": self._paper_names,
            "protocol": spec.get("protocol", "token"),
            "controls": grid.controls(config),
            "styles": self.styles,
            "runs": [
                asdict(run) | {"value": value} for run, value in grid.figure_runs(self.config, spec)
            ],
            "labels": self.all_labels,
        }

    @cached_property
    def _paper_names(self) -> dict[str, dict[str, str | None]]:
        """The paper's words for data sets and methods, by section."""
        return {
            section: {name: each.get("paper_name") for name, each in self.config[section].items()}
            for section in ("datasets", "methods")
        }

    def _sizes(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What a figure of sizes is told: the paper's tables, parameters of models."""
        config = self.config
        tables = [config["tables"][name] for name in spec["tables"]]
        shown = [config["experiments"][table["experiment"]]["models"] for table in tables]
        models = sorted({name for names in shown for name in names})
        return {
            "papers": [table.get("paper") for table in tables],
            "parameters": {name: config["models"][name]["shape"]["parameters"] for name in models},
        }

    @cached_property
    def all_labels(self) -> dict[str, dict[str, str]]:
        """The names of models that run, data sets and methods in tables, by section."""
        config = self.config
        run = {each.model for each in grid.all_runs(config)}
        sections = {
            "models": [name for name in config["models"] if name in run],
            "datasets": grid.datasets(config),
            "methods": config["methods"],
        }
        return {
            section: {name: self.label(section, name) for name in names}
            for section, names in sections.items()
        }

    def caption(self, figure: str) -> str:
        """Return the caption of a figure: its title, how to read it, and the edits per cell."""
        spec, sizes = self.config["figures"][figure], grid.datasets(self.config)
        runs = [run for run, _ in grid.figure_runs(self.config, spec)]
        for table in spec.get("tables", []):
            runs += grid.runs_of(self.config, self.config["tables"][table]["experiment"])
        n = [sizes[run.dataset] for run in runs]
        turns = [run.turn for run in runs]
        protocol, paper = spec.get("protocol", "token"), "paper" in spec
        return caption(spec["title"], spec["kind"], protocol, n, turns, paper=paper)

    # -- findings -------------------------------------------------------------------------------

    @cached_property
    def finding_cells(self) -> list[dict[str, Any]]:
        """Return where claims of the paper can be tested, with run folder or path file by role."""
        return [
            {
                "claim": claim.id,
                "model": self.label("models", model),
                "dataset": self.label("datasets", dataset),
                "sides": {role: self._tested(claim, run) for role, run in sides.items()},
                "names": {role: self._run_label(run) for role, run in sides.items()},
                "absent": claims.absent(self.config, claim, sides),
            }
            for claim in claims.read_claims(CLAIMS)
            for model, dataset, sides in claims.cells_of(self.config, claim)
        ]

    def _tested(self, claim: claims.Claim, run: grid.Run) -> str:
        """What a claim looks at of a run: its folder, or its path file if it is about layers."""
        paths = grid.needed(self.config, run, Paths) if claim.test["kind"] == "layers" else None
        return paths.path(run.model, run.dataset) if paths else run.folder()

    def finding_files(self, name: str) -> list[str]:
        """Return the files called ``name`` in the folders that claims are tested on.

        Path files count as predictions.
        """
        tested = {side for cell in self.finding_cells for side in cell["sides"].values()}
        folders = {path for path in tested if path.startswith("runs/")}
        files = [f"{path}/{name}" for path in folders]
        if name == "predictions.parquet":
            files += tested - folders
        return sorted(f"<results>/{path}" for path in files)

    def print_tables(self) -> None:
        """Show the finished tables of the paper on the terminal, and say where the rest is."""
        results = Path(self.results)
        papers = [name for name, spec in self.config["tables"].items() if "paper" in spec]
        made = [results / "tables" / f"{name}.md" for name in papers]
        made += [results / "comparisons" / f"{name}.md" for name in self.config["comparisons"]]
        for path in made:
            if path.is_file():
                print(f"\n{path.read_text(encoding='utf-8')}\n[{path}]")
        page = results / "index.html"
        if page.is_file():
            print(f"\nAll tables, figures and findings on one page: {page}")


def _nodes(path: str) -> str:
    """The importance of the nodes of a path file (rule node_importance)."""
    return path.replace("/paths/", "/nodes/").removesuffix(".safetensors") + ".parquet"
