"""Lay time and memory of all runs out as a table (kmebench.reporting)."""

from kmebench.io.files import atomic_path, write_text
from kmebench.io.logs import script_log
from kmebench.reporting.costs import costs, costs_markdown
from kmebench.reporting.html import page

with script_log(snakemake):
    table = costs(snakemake.input.timing, snakemake.params.runs)
    text = costs_markdown(table)
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    write_text(snakemake.output.md, text)
    write_text(snakemake.output.html, page("Time and memory", text))
