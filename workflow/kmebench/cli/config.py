"""The commands about a config: ``kmebench check-config`` and ``plan``. They need no torch."""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kmebench.errors import ConfigError
from kmebench.planning import cost, grid, provenance
from kmebench.planning.config import CONFIG, read_checked_config, read_files
from kmebench.planning.workflow import check_workflow, reason

console = Console(markup=False, emoji=False)


def check_command(arguments: argparse.Namespace) -> None:
    """Check, list or explain."""
    config = read_checked_config(CONFIG, arguments.configfile)
    if arguments.explain is None:
        console.print(grid.describe(config))
    else:
        files = read_files(CONFIG, arguments.configfile)
        console.print(_values(config, files, *provenance.cell_of(config, arguments.explain)))


def _values(
    config: Mapping[str, Any],
    files: Mapping[Path, Mapping[str, Any]],
    model: str,
    method: str,
    mode: str,
) -> Table:
    """One row for every value of such runs."""
    table = _table(f"{method} on {model}, {mode}", ["value", "is", "from", "key"], texts=4)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", False
    for row in provenance.values_of(config, files, model, method, mode):
        table.add_row(row.name, str(row.value), row.source, row.key)
    return table


def plan_command(arguments: argparse.Namespace) -> None:
    """Count, estimate, show."""
    check_workflow()
    config = read_checked_config(CONFIG, arguments.configfile)
    measured = cost.measurements(arguments.measured)
    if measured.empty:
        folders = ", ".join(map(str, arguments.measured))
        raise ConfigError(f"There is no finished run below {folders} to take times from.")
    costs = cost.run_costs(config, measured)
    console.print(_jobs(arguments.configfile))
    console.print(_hours(costs))
    for devices in arguments.devices:
        hours = cost.wall_hours(costs, devices)
        plural = "s" if devices > 1 else ""
        console.print(f"On {devices} device{plural}: {hours:,.1f} h or more.")
    if costs[["editing", "evaluation"]].isna().any(axis=None):
        console.print("A ? is a time that no finished run tells; it is in none of these sums.")
    console.print(_disk(cost.disk(config, measured)))


def _jobs(overlays: Sequence[Path]) -> Table:
    """What a dry run of the workflow counts: all jobs, finished ones included, by rule.

    Raises:
        ConfigError: the workflow cannot be planned; says why.
    """
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--quiet", "rules"]
    if overlays:
        command += ["--configfile", *map(str, overlays)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"The workflow cannot be planned: {reason(done.stderr)}")
    counts = done.stdout.partition("Job stats:\n")[2].partition("\n\n")[0]
    table = _table("jobs", ["rule", "jobs"])
    for line in counts.splitlines()[2:]:  # below a heading and a rule
        table.add_row(*line.split())
    return table


def _hours(costs: pd.DataFrame) -> Table:
    """Hours of one device by model, mode and where the seconds come from."""
    names = ["model", "mode", "times", "edits", "editing", "asking", "longest"]
    table = _table("hours of one device", names, texts=3)
    for key, runs in costs.groupby(["model", "mode", "source"]):
        numbers = [runs[c].sum(min_count=1) for c in ("editing", "evaluation")]
        shown = [_number(x, 1) for x in (*numbers, runs["hours"].max())]
        table.add_row(*key, f"{runs['edits'].sum():,}", *shown)
    return table


def _disk(sizes: pd.DataFrame) -> Table:
    """Gigabytes by model and kind of file."""
    table = _table("disk (GB; deltas at most)", [*sizes.columns, "all"])
    for row in sizes.set_index("model").T.items():
        table.add_row(row[0], *(_number(x / 1e9, 2) for x in (*row[1], row[1].sum(skipna=False))))
    return table


def _table(title: str, names: Sequence[str], texts: int = 1) -> Table:
    """An empty table of ``texts`` columns of text and others of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < texts else "right", no_wrap=True)
    return table


def _number(value: float, digits: int) -> str:
    """A number to read, ? where it is not known."""
    return "?" if pd.isna(value) else f"{value:,.{digits}f}"
