"""A figure of the config, by its kind. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kmebench.io.checked_files import read_parquet
from kmebench.reporting import figure_tables, figures, sizes, trade_offs
from kmebench.reporting.paper import read_paper_table


def drawn(spec: Mapping[str, Any], files: Sequence[str]) -> tuple[pd.DataFrame, Figure]:
    """Return a figure and the numbers behind it.

    Args:
        spec: what the rule ``figure`` is told (kmebench.planning.reported): kind, runs, labels,
            protocol, and what the kind needs.
        files: what the figure is made of, in the order of its runs or tables.
    """
    runs, labels, protocol = spec["runs"], spec["labels"], spec["protocol"]
    match spec["kind"]:
        case "overview" | "cost":
            table = figure_tables.trade_offs(files, runs, labels, protocol, spec["controls"])
            draw = trade_offs.overview if spec["kind"] == "overview" else trade_offs.cost_quality
            return table, draw(table, spec["styles"])
        case "time":
            table = figure_tables.times(files, runs, labels)
            return table, figures.time_per_edit(table, spec["styles"])
        case "nodes":
            table = figure_tables.nodes(files, runs, labels)
            return table, figures.node_importance(table)
        case "layers":
            table = figure_tables.layers(files, runs, labels)
            return table, figures.by_layer(table, "the impact of T+")
        case "edit-layers":
            table = figure_tables.edit_layers(files, runs, labels)
            return table, figures.by_layer(table, "‖ΔW‖²")
        case "norms":
            table = figure_tables.norms(files, runs, labels)
            return table, figures.weight_norms(table)
        case "sweep":
            table = figure_tables.swept(read_parquet(files[0]), runs, labels, protocol)
            return table, figures.sweep(table, spec["parameter"])
        case "edits":
            metrics = read_parquet(files[0])
            table = figure_tables.survival(metrics, labels, protocol)
            if paper := spec.get("paper"):
                ends = figure_tables.published_ends(
                    read_paper_table(paper), metrics, labels, spec["paper_names"]
                )
                table = pd.concat([table, ends], ignore_index=True)
            return table, figures.along_edits(table, spec["styles"])
        case "paper":
            named = zip(spec["tables"], files, strict=True)
            wide = {title: pd.read_csv(path) for title, path in named}
            table = figure_tables.against_paper(wide, labels)
            return table, figures.paper_scatter(table)
        case "sizes":
            table = _sizes(spec, files)
            return table, sizes.against_size(table, spec["styles"])
    raise ValueError(f"no kind of figure: {spec['kind']}")


def _sizes(spec: Mapping[str, Any], files: Sequence[str]) -> pd.DataFrame:
    """Return the table of a figure of sizes: of tables of ours and of the paper's."""
    papers = [read_paper_table(path) if path else None for path in spec["papers"]]
    ours = [pd.read_csv(path) for path in files]
    return sizes.sizes_table(
        list(zip(ours, papers, strict=True)),
        spec["labels"],
        spec["parameters"],
        spec["method"],
        spec["paper_names"],
        spec["controls"],
    )
