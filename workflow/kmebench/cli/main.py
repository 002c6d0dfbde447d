"""``kmebench``: the command line.

Commands are imported when they are called, and what they are asked for is checked before torch is.
"""

import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from kmebench.cli.parser import parser
from kmebench.io.logs import complaint, doing


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a model's letters
    try:
        chosen = parser().parse_args(argv)
        command, given = chosen.command, [chosen]
        if command.checks:
            given.append(_imported(f"inputs:{command.checks}")(chosen))
        with doing(f"starting {command.name}"):
            run = _imported(command.runs)
        run(*given)
    except Exception as error:
        told = complaint(error)
        if told is None:
            raise
        print("kmebench:", " ".join(told.splitlines()), file=sys.stderr)
        return 1
    return 0


def _imported(place: str) -> Any:
    """Import ``module:function`` of the command line."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"kmebench.cli.{module}"), function)
