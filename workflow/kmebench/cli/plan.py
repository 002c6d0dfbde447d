"""``kmebench plan``: jobs, hours and disk of a config. Needs no torch."""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from kmebench.cli.terminal import console, table
from kmebench.errors import ConfigError
from kmebench.io.logs import doing
from kmebench.planning import cost
from kmebench.planning.warnings import absent, warnings_of
from kmebench.planning.workflow import reason


def plan_command(arguments: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Count, estimate, show."""
    measured = cost.measurements(arguments.measured)
    if measured.empty:
        folders = ", ".join(map(str, arguments.measured))
        raise ConfigError(f"There is no finished run below {folders} to take times from.")
    costs = cost.run_costs(config, measured)
    with doing("planning the jobs"):
        jobs = _jobs(arguments.configfile)
    console.print(jobs)
    console.print(_hours(costs))
    for devices in arguments.devices:
        hours = cost.wall_hours(costs, devices)
        plural = "s" if devices > 1 else ""
        console.print(f"On {devices} device{plural}: {hours:,.1f} h or more.")
    if costs[["editing", "evaluation"]].isna().any(axis=None):
        console.print("A ? is a time that no finished run tells; it is in none of these sums.")
    console.print(_disk(cost.disk(config, measured)))
    for warning in [*absent(config), *warnings_of(config)]:
        console.print(f"Warning: {warning}")


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
    shown = table("jobs", ["rule", "jobs"])
    for line in counts.splitlines()[2:]:  # below a heading and a rule
        shown.add_row(*line.split())
    return shown


def _hours(costs: pd.DataFrame) -> Table:
    """Hours of one device by model, mode and where the seconds come from."""
    names = ["model", "mode", "times", "edits", "editing", "asking", "longest"]
    shown = table("hours of one device", names, texts=3)
    for key, runs in costs.groupby(["model", "mode", "source"]):
        hours = [runs[c].sum(min_count=1) for c in ("editing", "evaluation")]
        numbers = [_number(x, 1) for x in (*hours, runs["hours"].max())]
        shown.add_row(*key, f"{runs['edits'].sum():,}", *numbers)
    return shown


def _disk(sizes: pd.DataFrame) -> Table:
    """Gigabytes by model and kind of file."""
    shown = table("disk (GB; deltas at most)", [*sizes.columns, "all"])
    for row in sizes.set_index("model").T.items():
        shown.add_row(row[0], *(_number(x / 1e9, 2) for x in (*row[1], row[1].sum(skipna=False))))
    return shown


def _number(value: float, digits: int) -> str:
    """A number to read, ? where it is not known."""
    return "?" if pd.isna(value) else f"{value:,.{digits}f}"
