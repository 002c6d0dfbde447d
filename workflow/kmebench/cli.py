"""``kmebench``: the command line.

Commands that run a model are imported when they are called, so that all others need no torch.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kmebench import __version__
from kmebench.data.records import SLOT
from kmebench.errors import ConfigError, KMEBenchError
from kmebench.experiments import grid, plan
from kmebench.experiments.configuration import read_checked_config

console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KMEBenchError as error:
        print(f"kmebench: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kmebench", description="Edit facts in language models, and plan what that takes."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    model, fact = _model_options(), _fact_options()

    edit = commands.add_parser(
        "edit", parents=[model, fact], help="change one fact and show before and after"
    )
    edit.add_argument("--method", default="pac", help="a method of the config, or an editor")
    edit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a hyper-parameter; may be repeated",
    )
    edit.add_argument(
        "--moments",
        type=Path,
        metavar="FILE",
        help="second moments, for ROME, MEMIT and their family (default: the workflow's)",
    )
    edit.add_argument(
        "--neighbour",
        action="append",
        metavar="TEXT",
        help="a prompt whose answer should stay; may be repeated (default: the same question "
        "about other subjects of OpenFacts)",
    )
    edit.add_argument("--save-delta", type=Path, metavar="FILE", help="write the weight delta")
    edit.add_argument("--out", type=Path, metavar="FOLDER", help="write the edited model")
    edit.set_defaults(run=_later("edit_command"))

    trace = commands.add_parser(
        "trace", parents=[model, fact], help="show where a fact's critical paths lie"
    )
    trace.add_argument("--paths", type=int, default=15, help="paths per fact (default: 15)")
    trace.add_argument("--score", choices=["l2", "signed_sum"], default="l2")
    trace.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .pdf, .svg)")
    trace.set_defaults(run=_later("trace_command"))

    apply = commands.add_parser(
        "apply", parents=[model], help="make an edited model from a saved delta"
    )
    apply.add_argument("delta", type=Path, help="a delta.safetensors")
    apply.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    apply.set_defaults(run=_later("apply_command"))

    config = _config_options()
    check = commands.add_parser(
        "check-config", parents=[config], help="check a config, and list what it asks for"
    )
    check.set_defaults(run=check_command)

    planned = commands.add_parser(
        "plan", parents=[config], help="say what a config costs: jobs, hours, disk"
    )
    planned.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[Path("results")],
        metavar="FOLDER",
        help="finished runs to take seconds per edit from (default: results, with its reference)",
    )
    planned.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    planned.set_defaults(run=plan_command)
    return parser


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of :mod:`kmebench.fact_commands`, imported when it is called."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module("kmebench.fact_commands"), name)(arguments)

    return run


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--model", required=True, help="a model of the config, or a folder")
    options.add_argument(
        "--config",
        type=Path,
        default=Path("config.yaml"),
        metavar="FILE",
        help="where models and methods are defined (default: config.yaml)",
    )
    options.add_argument("--dtype", help="float32, bfloat16, ... (default: the config's)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    return options


def _config_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--configfile",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files merged over config.yaml, as Snakemake's option of that name does",
    )
    return options


def _fact_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--subject", required=True, help="who or what the fact is about")
    options.add_argument(
        "--prompt", required=True, help=f"a sentence's beginning, {SLOT} for the subject"
    )
    options.add_argument("--target", required=True, help="how it should go on")
    return options


# -- commands -------------------------------------------------------------------------------


def check_command(arguments: argparse.Namespace) -> None:
    """Check, list."""
    config = read_checked_config(Path("config.yaml"), arguments.configfile)
    console.print(grid.plan(config))


def plan_command(arguments: argparse.Namespace) -> None:
    """Count, estimate, show."""
    config = read_checked_config(Path("config.yaml"), arguments.configfile)
    measured = plan.measurements(arguments.measured)
    if measured.empty:
        folders = ", ".join(map(str, arguments.measured))
        raise ConfigError(f"There is no finished run below {folders} to take times from.")
    costs = plan.run_costs(config, measured)
    console.print(_jobs(arguments.configfile))
    console.print(_hours(costs))
    for devices in arguments.devices:
        hours = plan.wall_hours(costs, devices)
        plural = "s" if devices > 1 else ""
        console.print(f"On {devices} device{plural}: {hours:,.1f} h or more.")
    if costs[["editing", "evaluation"]].isna().any(axis=None):
        console.print("A ? is a time that no finished run tells; it is in none of these sums.")
    console.print(_disk(plan.disk(config, measured)))


def _jobs(overlays: Sequence[Path]) -> Table:
    """What a dry run of the workflow counts: all jobs, finished ones included, by rule.

    Raises:
        ConfigError: the workflow cannot be planned; shows what Snakemake says.
    """
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--quiet", "rules"]
    if overlays:
        command += ["--configfile", *map(str, overlays)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"The workflow cannot be planned:\n{done.stdout}{done.stderr}")
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
