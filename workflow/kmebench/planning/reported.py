"""What the rules that report read and are told: metrics, tables, figures. Imports no torch.

As in :mod:`kmebench.planning.inputs`, rules name methods as functions of the wildcards.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kmebench.editors.needs import Paths
from kmebench.planning import claims, grid
from kmebench.reporting.appearance import Style, styles

CLAIMS = "resources/paper/findings.yaml"
Files = Callable[[Any], list[str]]


@dataclass(frozen=True)
class Reported:
    """Inputs and parameters of the rules that report, from a checked config."""

    config: Mapping[str, Any]
    results: str  # the folder that ``<results>`` stands for

    # -- experiments ----------------------------------------------------------------------------

    def run_files(self, name: str) -> Files:
        """Return an input function: one file of every run of an experiment."""

        def files(wildcards: Any) -> list[str]:
            runs = grid.runs_of(self.config, wildcards.experiment)
            return [f"<results>/{run.folder()}/{name}" for run in runs]

        return files

    def health_files(self, wildcards: Any) -> list[str]:
        """Return the measurements of every run of an experiment, if its pipeline makes any."""
        mode = self.config["experiments"][wildcards.experiment]["mode"]
        measured = grid.measures_health(self.config, mode)
        return self.run_files("health.json")(wildcards) if measured else []

    def runs(self, wildcards: Any) -> list[dict[str, Any]]:
        """Return every run of an experiment."""
        return [asdict(run) for run in grid.runs_of(self.config, wildcards.experiment)]

    def originals(self, wildcards: Any) -> list[dict[str, str]]:
        """Return model and data set of every unedited model that an experiment compares with."""
        runs = grid.runs_of(self.config, wildcards.experiment)
        pairs = sorted({(run.model, run.dataset) for run in runs})
        return [{"model": model, "dataset": dataset} for model, dataset in pairs]

    def original_files(self, wildcards: Any) -> list[str]:
        """Return the predictions of these."""
        return [
            "<results>/original/{model}/{dataset}.parquet".format(**original)
            for original in self.originals(wildcards)
        ]

    def candidates(self, wildcards: Any) -> list[dict[str, Any]]:
        """Return every run of a sweep with the values it tries."""
        runs = grid.swept_runs(self.config, wildcards.experiment)
        return [asdict(run) | {"values": values} for run, values in runs]

    def tuned_mode(self, wildcards: Any) -> str | None:
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
        return name if run.variant == grid.DEFAULT else f"{name}, {run.variant}"

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How every method looks in figures and on the page, by its label."""
        cards = {m: grid.card_of_method(self.config, m) for m in self.config["methods"]}
        return {self.label("methods", m): style for m, style in styles(cards).items()}

    # -- comparisons ----------------------------------------------------------------------------

    def comparison_folders(self, wildcards: Any) -> list[str]:
        """Return the run folders that a comparison reads, each once."""
        pairs = grid.pairs_of(self.config, wildcards.comparison)
        return sorted({run.folder() for _, *sides in pairs for run in sides})

    def comparison_files(self, wildcards: Any) -> list[str]:
        """Return the predictions in these folders."""
        folders = self.comparison_folders(wildcards)
        return [f"<results>/{folder}/predictions.parquet" for folder in folders]

    def comparison_pairs(self, wildcards: Any) -> list[dict[str, str]]:
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

    def table_metrics(self, wildcards: Any) -> str:
        """Return the metrics that a table shows."""
        return f"<results>/metrics/{self.config['tables'][wildcards.table]['experiment']}.parquet"

    def table(self, wildcards: Any) -> dict[str, Any]:
        """Return what a table shows."""
        shown = self.config["tables"][wildcards.table]
        spec = self.config["experiments"][shown["experiment"]]
        return {
            "title": shown["title"],
            "protocol": shown["protocol"],
            "mode": spec["mode"],
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
        default = (grid.DEFAULT, self.config["seed"])
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

    def _figure_runs(self, spec: Mapping[str, Any]) -> list[tuple[grid.Run, Any]]:
        """The runs that a figure shows, each with the value of the swept parameter."""
        if spec["kind"] == "paper":
            return []
        if spec["kind"] in ("overview", "cost"):
            runs = [run for name in spec["experiments"] for run in grid.runs_of(self.config, name)]
            shown = dict.fromkeys(run for run in runs if run in self.default_runs)
            return [(run, grid.DEFAULT) for run in shown]
        parameter, runs = spec.get("parameter"), []
        for run, values in grid.swept_runs(self.config, spec["experiment"]):
            known = {"seed": run.seed} | values
            runs.append((run, known[parameter] if parameter else grid.DEFAULT))
        # The nodes of a data set are the same whichever run asks for them.
        if spec["kind"] in ("nodes", "layers"):
            runs = [(run, x) for run, x in runs if grid.needed(self.config, run, Paths)]
        # No edit takes no time and has no norm.
        if spec["kind"] in ("time", "norms"):
            controls = grid.controls(self.config)
            runs = [(run, x) for run, x in runs if run.method not in controls]
        return runs

    def figure_files(self, wildcards: Any) -> list[str]:
        """Return the files that a figure is drawn from, in the order of its runs."""
        spec = self.config["figures"][wildcards.figure]
        if spec["kind"] == "paper":
            return [f"<results>/tables/{table}.csv" for table in spec["tables"]]
        if spec["kind"] in ("sweep", "edits"):
            return [f"<results>/metrics/{spec['experiment']}.parquet"]
        if spec["kind"] in ("overview", "cost"):
            return [f"<results>/metrics/{name}.parquet" for name in spec["experiments"]]
        runs = [run for run, _ in self._figure_runs(spec)]
        if spec["kind"] in ("nodes", "layers"):
            paths = [(run, grid.needed(self.config, run, Paths)) for run in runs]
            files = [
                f"<results>/{need.path(run.model, run.dataset)}" for run, need in paths if need
            ]
            return files if spec["kind"] == "layers" else [_nodes(path) for path in files]
        name = {"time": "timing.json", "norms": "run.json"}[spec["kind"]]
        return [f"<results>/{run.folder()}/{name}" for run in runs]

    def figure(self, wildcards: Any) -> dict[str, Any]:
        """Return what a figure shows."""
        config, spec = self.config, self.config["figures"][wildcards.figure]
        return {
            **spec,
            "tables": [config["tables"][name]["title"] for name in spec.get("tables", [])],
            "protocol": spec.get("protocol", "token"),
            "controls": grid.controls(config),
            "styles": self.styles,
            "runs": [asdict(run) | {"value": value} for run, value in self._figure_runs(spec)],
            "labels": self.all_labels,
        }

    @cached_property
    def all_labels(self) -> dict[str, dict[str, str]]:
        """The names of all models, data sets and methods in tables, by section."""
        config = self.config
        sections = {
            "models": config["models"],
            "datasets": grid.datasets(config),
            "methods": config["methods"],
        }
        return {
            section: {name: self.label(section, name) for name in names}
            for section, names in sections.items()
        }

    # -- the page -------------------------------------------------------------------------------

    def page(self) -> dict[str, Any]:
        """Return what the page of the results shows beside tables and figures."""
        titled = {"tables": self.config["tables"], "comparisons": self.config["comparisons"]}
        return {
            "labels": self.all_labels,
            "colours": {label: style.colour for label, style in self.styles.items()},
            "controls": grid.controls(self.config),
            "seed": self.config["seed"],
            "statistics": self.config["statistics"],
            "pairs": self.page_pairs,
            "fact": self._fact(),
            "figures": {name: spec["title"] for name, spec in self.config["figures"].items()},
            "titles": {
                f"{folder}/{name}": spec["title"]
                for folder, specs in titled.items()
                for name, spec in specs.items()
            },
            "config": self._shown_config(),
        }

    @cached_property
    def _page_runs(self) -> list[grid.Run]:
        """The runs of the configured hyper-parameters and seed, in the order of the config."""
        labels = self.all_labels
        orders = [list(labels[section]) for section in ("models", "datasets", "methods")]

        def place(run: grid.Run) -> tuple[int, int, str, int]:
            found = zip(orders, (run.model, run.dataset, run.method), strict=True)
            model, dataset, method = (order.index(name) for order, name in found)
            return model, dataset, run.mode, method

        return sorted(self.default_runs, key=place)

    @cached_property
    def page_pairs(self) -> list[dict[str, str]]:
        """The pairs of runs that the page's sentences compare, as a comparison has them.

        ``forgets``: an editor's consecutive run and its batch. ``against``: the editor that the
        page looks at and its baseline, in one pipeline.
        """
        runs, pairs = set(self._page_runs), []
        other = self.config["page"]["baseline"]
        for run in self._page_runs:
            batch, rival = replace(run, mode="batch"), replace(run, method=other)
            if run.mode == "consecutive" and batch in runs:
                pairs.append(self._pair("forgets", run, batch))
            if run.method == self.config["page"]["editor"] and rival in runs:
                pairs.append(self._pair("against", run, rival))
        return pairs

    def _pair(self, question: str, a: grid.Run, b: grid.Run) -> dict[str, str]:
        return {
            "name": a.method,
            "question": question,
            "model": self.label("models", a.model),
            "dataset": self.label("datasets", a.dataset),
            "mode": a.mode,
            "editor": self.label("methods", a.method),
            "other": self.label("methods", b.method),
            "a": a.folder(),
            "b": b.folder(),
        }

    @cached_property
    def _fact_runs(self) -> list[grid.Run]:
        """The runs of one model, data set and pipeline; first that of the editor looked at."""
        own = [r for r in self._page_runs if r.method == self.config["page"]["editor"]][:1]
        left_out = {self.config["page"]["editor"], *grid.controls(self.config)}
        beside = [
            run
            for run in self._page_runs
            for first in own
            if run.method not in left_out and run == replace(first, method=run.method)
        ]
        return own + beside

    def _fact(self) -> dict[str, Any]:
        """Return the folders of these runs by editor, the path file, and where it is."""
        if not self._fact_runs:
            return {}
        own = self._fact_runs[0]
        return {
            "folders": {self.label("methods", r.method): r.folder() for r in self._fact_runs},
            "editor": self.label("methods", own.method),
            "place": f"{self.label('models', own.model)}, {self.label('datasets', own.dataset)}, "
            f"{own.mode} editing by {self.label('methods', own.method)}",
        }

    def fact_paths(self, wildcards: Any) -> list[str]:
        """Return the file with the paths of the editor looked at; none if it has no paths."""
        for run in self._fact_runs[:1]:
            if paths := grid.needed(self.config, run, Paths):
                return [f"<results>/{paths.path(run.model, run.dataset)}"]
        return []

    def page_files(self, wildcards: Any) -> list[str]:
        """Return the predictions that the page's sentences and its fact are made of."""
        folders = {pair[side] for pair in self.page_pairs for side in ("a", "b")}
        folders |= {run.folder() for run in self._fact_runs}
        return [f"<results>/{folder}/predictions.parquet" for folder in sorted(folders)]

    def _shown_config(self) -> str:
        """The config as YAML, without where files lie on this machine."""
        kept = {k: v for k, v in self.config.items() if k not in ("data_mirror", "pathvars")}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

    # -- findings -------------------------------------------------------------------------------

    def finding_cells(self) -> list[dict[str, Any]]:
        """Return where claims of the paper can be tested, with run folder or path file by role."""
        return [
            {
                "claim": claim.id,
                "model": self.label("models", model),
                "dataset": self.label("datasets", dataset),
                "sides": {role: self._tested(claim, run) for role, run in sides.items()},
                "names": {role: self._run_label(run) for role, run in sides.items()},
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
        tested = {side for cell in self.finding_cells() for side in cell["sides"].values()}
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
