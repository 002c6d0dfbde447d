"""From the files of a results folder to what its page shows. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kmebench.evaluation.score import read_predictions
from kmebench.evaluation.statistics import paired_difference, request_values
from kmebench.io.checked_files import read_parquet
from kmebench.io.files import sha256_of
from kmebench.reporting.headlines import headlines
from kmebench.reporting.html import Summary
from kmebench.reporting.one_fact import Fact, look_at
from kmebench.reporting.overview import panels
from kmebench.reporting.page_numbers import explorer, in_order, main_cells, once

COSTS = "tables/costs"


def summarise(
    *,
    title: str,
    results: str | Path,
    shown: Mapping[str, Any],
    metrics: Sequence[str],
    paths: Sequence[str],
    tables: Mapping[str, str],
    figures: Mapping[str, str],
    findings: str | Path,
    notebooks: Sequence[str],
    provenance: Mapping[str, str],
) -> Summary:
    """Gather the page of a results folder.

    ``shown`` is of :meth:`kmebench.planning.page.Page.shown`; ``metrics`` and ``paths`` are
    files, ``tables`` Markdown by path without ending, ``figures`` PNG files by name.
    """
    labels, seed = shown["labels"], shown["seed"]
    numbers, cells = pd.DataFrame(), pd.DataFrame()
    if metrics:
        read = pd.concat([read_parquet(path) for path in metrics], ignore_index=True)
        numbers = in_order(once(read), labels)
        cells = main_cells(numbers, labels, shown["controls"], seed)
    verdicts = pd.read_csv(findings)
    return Summary(
        title=title,
        panels=panels(cells, shown["colours"]),
        headlines=headlines(cells, _differences(Path(results), shown)),
        explorer=explorer(numbers, labels, seed) if metrics else {},
        tables={path: (title, tables[path]) for path, title in shown["titles"].items()},
        figures={name: (shown["figures"][name], path) for name, path in figures.items()},
        findings=verdicts.astype(object).where(verdicts.notna(), None).to_dict("records"),
        costs=tables.get(COSTS, ""),
        fact=_fact(Path(results), shown["fact"], paths),
        place=shown["fact"].get("place", ""),
        notebooks=notebooks,
        provenance=provenance,
        files={str(Path(path).relative_to(results)): sha256_of(path) for path in metrics},
        config=shown["config"],
    )


def _differences(results: Path, shown: Mapping[str, Any]) -> pd.DataFrame:
    """Compare the pairs that sentences are about: differences of Scores in points."""
    pairs = shown["pairs"]
    folders = {pair[side] for pair in pairs for side in ("a", "b")}
    values = {folder: _values(results / folder) for folder in folders}
    rows = []
    for pair in pairs:
        sides = values[pair["a"]], values[pair["b"]]
        found = paired_difference(*sides, "score", **shown["statistics"])
        points = {"difference": found.mean, "low": found.low, "high": found.high}
        rows.append({**pair, "n": found.n} | {name: 100 * x for name, x in points.items()})
    return pd.DataFrame(rows)


def _values(folder: Path) -> pd.DataFrame:
    frame = read_predictions(folder / "predictions.parquet")
    return request_values(frame[frame["when"] == "final"], "token")


def _fact(results: Path, told: Mapping[str, Any], paths: Sequence[str]) -> Fact | None:
    if not told:
        return None
    frames = {
        method: read_predictions(results / folder / "predictions.parquet")
        for method, folder in told["folders"].items()
    }
    return look_at(frames, told["editor"], paths[0] if paths else None)
