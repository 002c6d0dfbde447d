"""Write one table as CSV, Markdown, LaTeX and HTML (kmebench.reporting)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.reporting.tables")

from kmebench.io.checked_files import read_parquet
from kmebench.io.files import atomic_path, write_text
from kmebench.io.logs import script_log
from kmebench.reporting.html import page
from kmebench.reporting.paper import read_paper_table
from kmebench.reporting.tables import Layout, to_latex, to_markdown, wide_table

with script_log(snakemake):
    layout = Layout(**snakemake.params.table)
    paper = read_paper_table(snakemake.input.paper) if snakemake.input.paper else None
    table = wide_table(read_parquet(snakemake.input.metrics), paper, layout)
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False, float_format="%.4f")
    text = to_markdown(table, layout)
    write_text(snakemake.output.md, text)
    write_text(snakemake.output.html, page(layout.title, text))
    write_text(snakemake.output.tex, to_latex(table, layout))
