"""Static pages: Markdown tables made sortable, and the summary of a run. Imports no torch.

A page needs no network: style and script stand in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mistune
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kmebench.io.checked_files import read_json

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


def index(
    title: str,
    findings: str,
    tables: Mapping[str, str],
    figures: Mapping[str, str],
    notebooks: Sequence[str],
    provenance: Mapping[str, str],
) -> str:
    """Make the summary page of a results folder; links are relative to that folder.

    ``findings`` and ``tables`` (by path without ending, as ``tables/table1``) are Markdown,
    ``figures`` titles by name; ``provenance`` comes from :func:`provenance_of`.
    """
    shown = [
        {"name": path.rpartition("/")[2], "html": fragment(text), "csv": f"{path}.csv"}
        for path, text in tables.items()
    ]
    return _PAGES.get_template("index.html.j2").render(
        title=title,
        summary=f"{provenance['Runs']} runs, {provenance['Edits']} edits.",
        findings=fragment(findings),
        tables=shown,
        figures=[
            {"name": name, "title": text}
            | {kind: f"figures/{name}.{kind}" for kind in ("pdf", "png", "csv")}
            for name, text in figures.items()
        ],
        notebooks=[{"name": n, "html": f"notebooks/{n}.html"} for n in notebooks],
        provenance=provenance,
    )


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
        "Seed": _joined(run["settings"]["seed"] for run in made),
        "Device": _joined(f"{t['device']}, {t['dtype']}, {t['threads']} threads" for t in spent),
        "Machine": _joined(f"{run['machine']}, Python {run['python']}" for run in made),
        "Packages": _joined(packages),
    }


def _joined(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values}))
