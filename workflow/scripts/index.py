"""Write the page of a results folder (kmebench.reporting)."""

from pathlib import Path

from kmebench.io.files import write_text
from kmebench.io.logs import script_log
from kmebench.reporting.html import index, provenance_of
from kmebench.reporting.summary import summarise

with script_log(snakemake):
    params, files = snakemake.params, snakemake.input
    texts = [Path(path).read_text(encoding="utf-8") for path in files.tables]
    page = summarise(
        title=params.title,
        results=params.results,
        shown=params.page,
        metrics=files.metrics,
        paths=files.paths,
        tables=dict(zip(params.tables, texts, strict=True)),
        figures=dict(zip(params.page["figures"], files.figures, strict=True)),
        findings=files.findings,
        notebooks=params.notebooks,
        provenance=provenance_of(files.runs, files.timing),
    )
    write_text(snakemake.output.html, index(page))
