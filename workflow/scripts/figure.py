"""Draw one figure as PDF, SVG and PNG, with the numbers behind it as CSV (kmebench.reporting)."""

import pandas as pd

from kmebench.io.checked_files import read_parquet
from kmebench.io.files import atomic_path
from kmebench.io.logs import script_log
from kmebench.reporting import figure_tables, figures, trade_offs
from kmebench.reporting.panels import save

with script_log(snakemake):
    spec, files = snakemake.params.figure, list(snakemake.input.files)
    runs, labels, protocol = spec["runs"], spec["labels"], spec["protocol"]
    match spec["kind"]:
        case "overview" | "cost":
            table = figure_tables.trade_offs(files, runs, labels, protocol, spec["controls"])
            draw = trade_offs.overview if spec["kind"] == "overview" else trade_offs.cost_quality
            figure = draw(table, spec["styles"])
        case "time":
            table = figure_tables.times(files, runs, labels)
            figure = figures.time_per_edit(table, spec["styles"])
        case "nodes":
            table = figure_tables.nodes(files, runs, labels)
            figure = figures.node_importance(table)
        case "layers":
            table = figure_tables.layers(files, runs, labels)
            figure = figures.layer_impact(table)
        case "norms":
            table = figure_tables.norms(files, runs, labels)
            figure = figures.weight_norms(table)
        case "sweep":
            table = figure_tables.swept(read_parquet(files[0]), runs, labels, protocol)
            figure = figures.sweep(table, spec["parameter"])
        case "edits":
            table = figure_tables.survival(read_parquet(files[0]), labels, protocol)
            figure = figures.along_edits(table, spec["styles"])
        case "paper":
            named = zip(spec["tables"], files, strict=True)
            wide = {title: pd.read_csv(path) for title, path in named}
            table = figure_tables.against_paper(wide, labels)
            figure = figures.paper_scatter(table)
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    save(figure, snakemake.output.pdf, snakemake.output.svg, snakemake.output.png)
