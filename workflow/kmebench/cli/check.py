"""``kmebench check-config``: is a config right, and where does a value come from? No pandas."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from kmebench.cli.terminal import console, table
from kmebench.planning import grid, provenance
from kmebench.planning.config import CONFIG, read_checked_config, read_files
from kmebench.planning.warnings import absent, warnings_of


def check_command(arguments: argparse.Namespace) -> None:
    """Check, list or explain."""
    config = read_checked_config(CONFIG, arguments.configfile)
    if arguments.explain is None:
        console.print(grid.describe(config))
        for warning in [*absent(config), *warnings_of(config)]:
            console.print(f"Warning: {warning}")
    else:
        console.print(_values(config, arguments.configfile, arguments.explain))


def _values(config: dict[str, Any], overlays: list[Path], cell: str) -> Table:
    """One row for every value of the runs of MODEL/METHOD/MODE."""
    model, method, mode = provenance.cell_of(config, cell)
    files = read_files(CONFIG, overlays)
    names = ["value", "is", "from", "key"]
    shown = table(f"{method} on {model}, {mode}", names, texts=4, fold=True)
    for row in provenance.values_of(config, files, model, method, mode):
        shown.add_row(row.name, str(row.value), row.source, row.key)
    return shown
