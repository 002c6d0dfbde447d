"""What every editor takes and leaves, from the timing.json files of runs. Imports no torch."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import pandas as pd

from kmebench.io.checked_files import read_json
from kmebench.reporting.tables import MISSING, markdown_table

#: Parts of an edit, as editors' stopwatches call them (kmebench.editors.base).
STAGES = ("trace", "optimise", "solve", "apply", "final_edit")
#: Kinds of questions whose gates are counted (kmebench.evaluation.prompts).
KINDS = ("edit", "paraphrase", "locality", "portability")
_RUN = ["model", "dataset", "mode", "editor", "edits"]
_TAKES = ["seconds_per_edit", "median_seconds", *(f"{stage}_seconds" for stage in STAGES)]
_TAKES += ["other_seconds", "steps", "peak_gib"]
_BYTES = ["change_bytes", "state_bytes"]
_GATES = [f"gate_{kind}" for kind in KINDS]
_LEAVES = ["question_ms_before", "question_ms_after", *_BYTES, *_GATES]
COLUMNS = [*_RUN, *_TAKES, *_LEAVES]


def costs(files: Sequence[str], runs: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """One row per run: what an edit takes, what edits leave, and what a question costs.

    ``runs``: labels model, dataset, mode, editor of every file. Taken are seconds per edit, whole
    and by stage, steps per call, and peak memory (the GPU's where there is one, else the whole
    process's). Left are bytes of the change and of the editor's state. Then milliseconds per
    question before and after, and the share of gates that opened, by kind. Runs before version 0.3
    lack these, and edits without a gate the last.
    """
    rows = [
        {**run, **_taken(timing), **_left(timing)}
        for timing, run in zip(map(read_json, files), runs, strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(_BYTES, "Int64"))


def _taken(timing: Mapping[str, Any]) -> dict[str, Any]:
    stages = {f"{stage}_seconds": timing["seconds"].get(stage, 0.0) for stage in STAGES}
    peak = timing["peak_memory_bytes"]
    return stages | {
        "edits": timing["requests"],
        "seconds_per_edit": timing["seconds_per_edit"],
        "median_seconds": timing["median_seconds_per_edit"],
        "other_seconds": timing["seconds_per_edit"] - sum(stages.values()),
        "steps": timing["steps_per_call"],
        "peak_gib": peak.get("cuda", peak["process"]) / 2**30,
    }


def _left(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands at the end: of all edits, or of the first batch."""
    last = timing.get("bytes", [{}])[-1]
    asked = timing.get("question_milliseconds", {})
    return {
        **{f"question_ms_{when}": asked.get(when, nan) for when in ("before", "after")},
        **{f"{what}_bytes": last.get(what, nan) for what in ("change", "state")},
        **{f"gate_{kind}": timing.get("gate", {}).get(kind, nan) for kind in KINDS},
    }


def costs_markdown(table: pd.DataFrame) -> str:
    """Render for people: what an edit takes, and what it leaves where that was measured."""
    measured = table[table["change_bytes"].notna()]
    return _takes_markdown(table) + (f"\n{_leaves_markdown(measured)}" if len(measured) else "")


def _takes_markdown(table: pd.DataFrame) -> str:
    caption = (
        "**Time and memory. Seconds per edit without loading and evaluation, by stage; steps per "
        "call of the editor; peak memory of the GPU, or of the whole process without one.**"
    )
    head = ["Model", "Data set", "Pipeline", "Editor", "Edits", "s/edit", "Median"]
    head += [*(stage.capitalize() for stage in STAGES), "Other", "Steps", "Peak (GiB)"]
    lines = [head]
    for row in table.to_dict("records"):
        lines.append([*(str(row[name]) for name in _RUN), *(f"{row[x]:.2f}" for x in _TAKES)])
    return f"{caption}\n\n{markdown_table(lines)}\n"


def _leaves_markdown(table: pd.DataFrame) -> str:
    caption = (
        "**What edits leave, and what a question costs. Milliseconds per question, scored with the "
        "unedited and with the edited model; MiB of the change and of what the editor remembers, "
        "after all edits or one batch; percent of questions by kind that a gate opened for.**"
    )
    head = ["Model", "Data set", "Pipeline", "Editor", "Edits", "ms/question, before", "after"]
    head += ["Change (MiB)", "State (MiB)", *(f"Gate, {kind} (%)" for kind in KINDS)]
    lines = [head]
    for row in table.to_dict("records"):
        numbers = [row["question_ms_before"], row["question_ms_after"]]
        numbers += [row[name] / 2**20 for name in _BYTES] + [100 * row[name] for name in _GATES]
        cells = (MISSING if pd.isna(x) else f"{x:.2f}" for x in numbers)
        lines.append([*(str(row[name]) for name in _RUN), *cells])
    return f"{caption}\n\n{markdown_table(lines)}\n"
