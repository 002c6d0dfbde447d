"""``kmebench evaluate``: a folder's model on tasks of lm-evaluation-harness."""

import argparse
import json
import logging

from kmebench.cli.terminal import Table, console, table
from kmebench.evaluation.harness import TaskScore, harness, scores
from kmebench.io.files import write_text


def evaluate_command(arguments: argparse.Namespace, loading: dict[str, str]) -> None:
    """Evaluate, show, save."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = harness(
        arguments.folder,
        arguments.tasks,
        include=arguments.include,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        **loading,
    )
    console.print(_shown(str(arguments.folder), scores(found)))
    if arguments.out:
        write_text(arguments.out, json.dumps({"model": str(arguments.folder)} | found, indent=2))
        console.print(f"results: {arguments.out}")


def _shown(folder: str, rows: list[TaskScore]) -> Table:
    """One row for every metric of every task."""
    shown = table(folder, ["task", "metric", "value", "± s.e.", "documents"], texts=2)
    for row in rows:
        error = "" if row.stderr is None else f"{row.stderr:.4f}"
        count = "" if row.documents is None else f"{row.documents:,}"
        shown.add_row(row.task, row.metric, f"{row.value:.4f}", error, count)
    return shown
