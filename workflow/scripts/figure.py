"""Draw one figure as PDF, SVG and PNG, with the numbers behind it as CSV (kmebench.reporting)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.reporting.drawing")

from kmebench.io.files import atomic_path
from kmebench.io.logs import script_log
from kmebench.reporting.drawing import drawn
from kmebench.reporting.panels import save

with script_log(snakemake):
    table, figure = drawn(snakemake.params.figure, list(snakemake.input.files))
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    save(figure, snakemake.output.pdf, snakemake.output.svg, snakemake.output.png)
