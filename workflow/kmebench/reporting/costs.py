"""Time and memory of every editor, from the timing.json files of runs. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kmebench.io.checked_files import read_json
from kmebench.reporting.tables import markdown_table

#: Parts of an edit, as editors' stopwatches call them (kmebench.editors.base).
STAGES = ("trace", "optimise", "solve", "apply", "finish")
COLUMNS = ["model", "dataset", "mode", "editor", "edits", "seconds_per_edit", "median_seconds"]
COLUMNS += [*(f"{stage}_seconds" for stage in STAGES), "other_seconds", "steps", "peak_gib"]


def costs(files: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run: seconds per edit, whole and by stage, steps per call, peak memory.

    ``runs``: labels model, dataset, mode, editor of every file. Peak memory is the GPU's where
    there is one, else the whole process's.
    """
    rows = []
    for path, run in zip(files, runs, strict=True):
        timing = read_json(path)
        stages = {f"{stage}_seconds": timing["seconds"].get(stage, 0.0) for stage in STAGES}
        peak = timing["peak_memory_bytes"]
        rows.append(
            dict(run)
            | stages
            | {
                "edits": timing["requests"],
                "seconds_per_edit": timing["seconds_per_edit"],
                "median_seconds": timing["median_seconds_per_edit"],
                "other_seconds": timing["seconds_per_edit"] - sum(stages.values()),
                "steps": timing["steps_per_call"],
                "peak_gib": peak.get("cuda", peak["process"]) / 2**30,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def costs_markdown(table: pd.DataFrame) -> str:
    """Render for people."""
    caption = (
        "**Time and memory. Seconds per edit without loading and evaluation, by stage; steps per "
        "call of the editor; peak memory of the GPU, or of the whole process without one.**"
    )
    head = ["Model", "Data set", "Pipeline", "Editor", "Edits", "s/edit", "Median"]
    head += [*(stage.capitalize() for stage in STAGES), "Other", "Steps", "Peak (GiB)"]
    lines = [head]
    for row in table.to_dict("records"):
        numbers = [row[name] for name in COLUMNS[5:]]
        cells = [row["model"], row["dataset"], row["mode"], row["editor"], str(row["edits"])]
        lines.append([*cells, *(f"{x:.2f}" for x in numbers)])
    return f"{caption}\n\n{markdown_table(lines)}\n"
