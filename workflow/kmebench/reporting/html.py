"""Static pages: Markdown tables made sortable, and the summary of a run. Imports no torch.

A page needs no network: style and script stand in it.
"""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mistune
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from kmebench.io.checked_files import read_json
from kmebench.reporting import overview
from kmebench.reporting.headlines import Headline
from kmebench.reporting.one_fact import Fact
from kmebench.reporting.overview import Panel

_PAGES = Environment(
    loader=PackageLoader("kmebench.reporting"), autoescape=True, undefined=StrictUndefined
)
_TO_HTML = mistune.create_markdown(escape=True, plugins=["table"])


def fragment(markdown: str) -> Markup:
    """Turn Markdown into HTML; tags inside it are shown, not obeyed."""
    return Markup(_TO_HTML(markdown))


def page(title: str, markdown: str) -> str:
    """Make a page of one Markdown text."""
    body = Markup('<h1>{}</h1><div class="scroll">{}</div>').format(title, fragment(markdown))
    return _PAGES.get_template("page.html.j2").render(title=title, body=body)


@dataclass(frozen=True)
class Summary:
    """What stands on the page of a results folder; what is empty is left out.

    ``tables``: title and Markdown by path without ending, as ``tables/table1``; ``costs`` is
    Markdown, too.
    ``figures``: caption and PNG file by name. ``findings``: rows of ``tables/findings.csv``.
    ``place``: words on where ``fact`` was edited. ``files``: SHA-256 of files beside the page.
    """

    title: str
    panels: Sequence[Panel]
    headlines: Sequence[Headline]
    explorer: Mapping[str, Any]
    tables: Mapping[str, tuple[str, str]]
    figures: Mapping[str, tuple[str, str | Path]]
    findings: Sequence[Mapping[str, Any]]
    costs: str
    fact: Fact | None
    place: str
    notebooks: Sequence[str]
    provenance: Mapping[str, str]
    files: Mapping[str, str]
    config: str


def index(summary: Summary) -> str:
    """Make the page of a results folder: one file that needs nothing beside it.

    Links lead to the files below that folder, relative to it.
    """
    shown = {field.name: getattr(summary, field.name) for field in fields(summary)}
    shown["tables"] = [
        {"id": path.replace("/", "-"), "title": title, "html": fragment(text), "csv": f"{path}.csv"}
        for path, (title, text) in summary.tables.items()
    ]
    shown["figures"] = [
        {"name": name, "caption": caption} | _embedded(png)
        for name, (caption, png) in summary.figures.items()
    ]
    costs = fragment(summary.costs) if summary.costs else ""
    verdicts = Counter(row["verdict"] for row in summary.findings)
    return _PAGES.get_template("index.html.j2").render(
        **shown | {"costs": costs}, verdicts=verdicts, frame=overview
    )


def _embedded(png: str | Path) -> dict[str, Any]:
    """Return a picture as an address that holds it, shown at half its size for fine screens."""
    with Image.open(png) as picture:
        width, height = (length // 2 for length in picture.size)
    address = f"data:image/png;base64,{b64encode(Path(png).read_bytes()).decode()}"
    return {"data": address, "width": width, "height": height}


def provenance_of(runs: Sequence[str | Path], timings: Sequence[str | Path]) -> dict[str, str]:
    """Summarise how runs were made, from their run.json and timing.json files."""
    made, spent = ([read_json(path) for path in paths] for paths in (runs, timings))
    seconds = sum(t["seconds_per_edit"] * t["requests"] for t in spent)
    packages = {f"{name} {number}" for run in made for name, number in run["versions"].items()}
    return {
        "Runs": str(len(made)),
        "Edits": str(sum(t["requests"] for t in spent)),
        "Edits that failed": str(sum(t["failed_edits"] for t in spent)),
        "Time spent editing": f"{seconds / 60:.1f} min",
        "Time spent loading models": f"{sum(t['model_load_seconds'] for t in spent) / 60:.1f} min",
        "KME-Bench": _joined(run["kmebench"] for run in made),
        "Commit": _joined(run["git_commit"] for run in made),
        "Requests (SHA-256)": _joined(
            f"{run['requests']['count']}: {run['requests']['sha256']}" for run in made
        ),
        "Seed": _joined(run["settings"]["seed"] for run in made),
        "Device": _joined(f"{t['device']}, {t['dtype']}, {t['threads']} threads" for t in spent),
        "Machine": _joined(f"{run['machine']}, Python {run['python']}" for run in made),
        "Packages": _joined(packages),
    }


def _joined(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values}))
