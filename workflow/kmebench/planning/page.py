"""What the page of the results reads and shows. Imports no torch."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from kmebench.editors.needs import Paths
from kmebench.planning import grid
from kmebench.planning.reported import Reported
from kmebench.planning.wildcards import Wildcards


@dataclass(frozen=True)
class Page:
    """The page ``index.html`` beside its tables and figures."""

    reported: Reported

    def shown(self) -> dict[str, Any]:
        """Return what the page of the results shows beside tables and figures."""
        config = self.reported.config
        return {
            "labels": self.reported.all_labels,
            "colours": {label: style.colour for label, style in self.reported.styles.items()},
            "controls": grid.controls(config),
            "seed": config["seed"],
            "statistics": config["statistics"],
            "pairs": self.pairs,
            "fact": self._fact(),
            "figures": {name: self.reported.caption(name) for name in config["figures"]},
            "titles": {
                f"{folder}/{name}": spec["title"]
                for folder in ("tables", "comparisons")
                for name, spec in config[folder].items()
            },
            "config": self._shown_config(),
        }

    @cached_property
    def _runs(self) -> list[grid.Run]:
        """The runs of the configured hyper-parameters and seed, in the order of the config."""
        labels = self.reported.all_labels
        orders = [list(labels[section]) for section in ("models", "datasets", "methods")]

        def place(run: grid.Run) -> tuple[int, int, str, int]:
            found = zip(orders, (run.model, run.dataset, run.method), strict=True)
            model, dataset, method = (order.index(name) for order, name in found)
            return model, dataset, run.mode, method

        return sorted(self.reported.default_runs, key=place)

    @cached_property
    def pairs(self) -> list[dict[str, str]]:
        """The pairs of runs that the page's sentences compare, as a comparison has them.

        ``forgets``: an editor's consecutive run and its batch. ``against``: the editor that the
        page looks at and its baseline, in one pipeline.
        """
        runs, pairs = set(self._runs), []
        other = self.reported.config["page"]["baseline"]
        for run in self._runs:
            batch, rival = replace(run, mode="batch"), replace(run, method=other)
            if run.mode == "consecutive" and batch in runs:
                pairs.append(self._pair("forgets", run, batch))
            if run.method == self.reported.config["page"]["editor"] and rival in runs:
                pairs.append(self._pair("against", run, rival))
        return pairs

    def _named(self, run: grid.Run) -> dict[str, str]:
        """Return what readers see of a run."""
        label = self.reported.label
        return {
            "model": label("models", run.model),
            "dataset": label("datasets", run.dataset),
            "mode": run.mode,
            "editor": label("methods", run.method),
        }

    def _pair(self, question: str, a: grid.Run, b: grid.Run) -> dict[str, str]:
        other = self._named(b)["editor"]
        sides = {"a": a.folder(), "b": b.folder()}
        return {"question": question, **self._named(a), "other": other, **sides}

    @cached_property
    def _fact_runs(self) -> list[grid.Run]:
        """The runs of one model, data set and pipeline; first that of the editor looked at."""
        own = [r for r in self._runs if r.method == self.reported.config["page"]["editor"]][:1]
        left_out = {self.reported.config["page"]["editor"], *grid.controls(self.reported.config)}
        beside = [
            run
            for run in self._runs
            for first in own
            if run.method not in left_out and run == replace(first, method=run.method)
        ]
        return own + beside

    def _fact(self) -> dict[str, Any]:
        """Return the folders of these runs by editor, the path file, and where it is."""
        if not self._fact_runs:
            return {}
        own = self._named(self._fact_runs[0])
        place = f"{own['model']}, {own['dataset']}, {own['mode']} editing by {own['editor']}"
        folders = {self._named(run)["editor"]: run.folder() for run in self._fact_runs}
        return {"folders": folders, "editor": own["editor"], "place": place}

    def paths(self, wildcards: Wildcards) -> list[str]:
        """Return the file with the paths of the editor looked at; none if it has no paths."""
        for run in self._fact_runs[:1]:
            if paths := grid.needed(self.reported.config, run, Paths):
                return [f"<results>/{paths.path(run.model, run.dataset)}"]
        return []

    def predictions(self, wildcards: Wildcards) -> list[str]:
        """Return the predictions that the page's sentences and its fact are made of."""
        folders = {pair[side] for pair in self.pairs for side in ("a", "b")}
        folders |= {run.folder() for run in self._fact_runs}
        return [f"<results>/{folder}/predictions.parquet" for folder in sorted(folders)]

    def _shown_config(self) -> str:
        """The config as YAML, without where files lie on this machine."""
        kept = {
            k: v for k, v in self.reported.config.items() if k not in ("data_mirror", "pathvars")
        }
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
