"""Write the summary page of a results folder (kmebench.reporting)."""

from pathlib import Path

from kmebench.io.files import write_text
from kmebench.io.logs import script_log
from kmebench.reporting.html import index, provenance_of

with script_log(snakemake):
    params, files = snakemake.params, snakemake.input
    read = [Path(path).read_text(encoding="utf-8") for path in files.tables]
    text = index(
        title=params.title,
        findings=Path(files.findings).read_text(encoding="utf-8"),
        tables=dict(zip(params.tables, read, strict=True)),
        figures=params.figures,
        notebooks=params.notebooks,
        provenance=provenance_of(files.runs, files.timing),
    )
    write_text(snakemake.output.html, text)
