"""What the commands show: tables and sentences; on a terminal in colour, in a pipe plain."""

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table

from kmebench.io.files import write_text

#: Columns of a pipe, so that a row of a table is a line.
_PIPE = 1000

console = Console(
    markup=False,
    emoji=False,
    highlight=False,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE,
)


def table(title: str, names: Sequence[str], texts: int = 1, fold: bool = False) -> Table:
    """An empty table of ``texts`` columns of text and others of numbers; long texts may fold."""
    made = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
    )
    for i, name in enumerate(names):
        made.add_column(
            name, justify="left" if i < texts else "right", no_wrap=not fold, overflow="fold"
        )
    return made


def draw(path: Path, shown: Iterable[RenderableType], width: int = 100) -> None:
    """Draw what a terminal of ``width`` columns would show, as SVG.

    The picture asks no server for a font: it takes the reader's own.
    """
    paper = Console(file=io.StringIO(), record=True, width=width, markup=False, emoji=False)
    for each in shown:
        paper.print(each, highlight=False)
    svg = paper.export_svg(title="kmebench")
    write_text(path, re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))
