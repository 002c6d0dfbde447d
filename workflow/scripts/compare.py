"""Compare runs in pairs (kmebench.reporting.comparisons)."""

from kmebench.io.files import atomic_path, write_text
from kmebench.io.logs import script_log
from kmebench.reporting.comparisons import compare, comparison_markdown
from kmebench.reporting.html import page

with script_log(snakemake):
    params = snakemake.params
    files = dict(zip(params.folders, snakemake.input.predictions, strict=True))
    table = compare(params.pairs, files, params.protocol, params.statistics)
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False, float_format="%.4f")
    text = comparison_markdown(table, params.title, params.protocol)
    write_text(snakemake.output.md, text)
    write_text(snakemake.output.html, page(params.title, text))
