"""Tables 1 and 2 in the paper's layout, with intervals and the paper's numbers beside ours."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import HEALTH, Metric, table_columns
from kmebench.evaluation.score import NEWEST
from kmebench.evaluation.statistics import ENOUGH_EDITS, SIGNIFICANT
from kmebench.modes import DEFAULT, in_turns, split_mode
from kmebench.reporting.paper import ORIGINAL

MISSING = "–"
_HALF = "Half at"
Labels = Mapping[str, Mapping[str, str | None]]  # name -> {label, paper_name}


@dataclass(frozen=True)
class Layout:
    """What a table shows: one protocol, one pipeline; rows and columns in this order.

    ``controls``: methods that edit nothing, so none of them is ever the best.
    """

    title: str
    protocol: str
    mode: str
    models: Labels
    datasets: Labels
    methods: Labels
    controls: Collection[str] = ()

    @property
    def consecutive(self) -> bool:
        """Whether edits stay while others follow."""
        return split_mode(self.mode)[0] == "consecutive"

    @property
    def compared(self) -> Labels:
        """The unedited model, then the methods."""
        first = {"original": {"label": "Original model", "paper_name": ORIGINAL}}
        return first | dict(self.methods)


def wide_table(metrics: pd.DataFrame, paper: pd.DataFrame | None, layout: Layout) -> pd.DataFrame:
    """Lay metrics out, one row per model, method, variant, seed and data set, in percent.

    Columns: model, editor (the method), variant, seed, dataset; for every tabled metric of requests
    its value, ``_low``, ``_high``, ``_paper`` and ``_difference`` (ours − paper), and ``_tied``:
    not the best, but of enough edits not distinguishable from the best (paired bootstrap, Holm over
    the methods of the column); ``write_efficacy`` (consecutive: right after each edit); n,
    seconds_per_edit, failed_edits, protocol, mode; every tabled metric of the final model's state
    that any run has, in its own unit; and, of consecutive runs of more than :data:`NEWEST` edits,
    ``half_after``: the edits, from :data:`ENOUGH_EDITS` on, after which Score was first below half
    of its best (NaN: never).
    Missing runs are rows of NaN. The paper's numbers stand beside the variant ``default`` only.
    """
    of_mode = metrics[metrics["mode"] == layout.mode]
    chosen = of_mode[of_mode["protocol"].isin([layout.protocol, HEALTH])]
    if not (chosen["protocol"] == layout.protocol).any():
        raise KMEBenchError(
            f"There are no metrics of protocol {layout.protocol!r} in pipeline {layout.mode!r}."
        )
    rows = []
    for model in layout.models:
        for method in layout.compared:
            of_method = chosen[(chosen["model"] == model) & (chosen["method"] == method)]
            for (variant, seed), of_run in _runs(of_method):
                for dataset in layout.datasets:
                    cell = of_run[of_run["dataset"] == dataset]
                    known = paper if variant == DEFAULT else None
                    published = _published(known, layout, model, method, dataset)
                    name = {"model": model, "editor": method, "variant": variant, "seed": seed}
                    rows.append(name | {"dataset": dataset} | _cells(cell, published))
    table = pd.DataFrame(rows).assign(protocol=layout.protocol, mode=layout.mode)
    states = [metric.name for metric in table_columns("state")]
    empty = [name for name in states if table[name].isna().all()]
    long = layout.consecutive and table["n"].max() > NEWEST
    short = [] if long else ["half_after"]
    return table.drop(columns=[*empty, *short])


def _runs(of_method: pd.DataFrame) -> list[tuple[tuple[str, int | None], pd.DataFrame]]:
    """Split by (variant, seed) in the order of the grid; one empty default without any run."""
    if of_method.empty:
        return [((DEFAULT, None), of_method)]
    return list(of_method.groupby(["variant", "seed"], sort=False))


def _cells(cell: pd.DataFrame, published: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of one model, method, seed and data set."""
    final = cell[cell["when"] == "final"].set_index("metric")
    written = cell[cell["when"] == "write"].set_index("metric")
    row: dict[str, Any] = {}
    for metric in table_columns("request"):
        name = metric.name
        found = final.loc[name] if name in final.index else None
        for end, column in (("", "value"), ("_low", "low"), ("_high", "high")):
            row[name + end] = float("nan") if found is None else metric.scale * found[column]
        row[f"{name}_tied"] = found is not None and tied(found)
        row[f"{name}_paper"] = published.get(name, float("nan"))
        row[f"{name}_difference"] = row[name] - row[f"{name}_paper"]
    has_write = "efficacy" in written.index
    row["write_efficacy"] = 100 * written.loc["efficacy", "value"] if has_write else float("nan")
    requests = final[final["protocol"] != HEALTH]
    row["n"] = int(requests["n"].max()) if len(requests) else 0
    row["seconds_per_edit"] = final["seconds_per_edit"].max()
    row["failed_edits"] = final["failed_edits"].max()
    row["half_after"] = _half_after(cell)
    for metric in table_columns("state"):
        values = final["value"].reindex([metric.name])
        row[metric.name] = metric.scale * values.item()
    return row


def _half_after(cell: pd.DataFrame) -> float:
    """The first milestone at which Score is below half of the best one until then.

    Milestones of fewer than :data:`ENOUGH_EDITS` edits do not count: one right edit scores 100.
    """
    asked = cell["when"].isin(["milestone", "final"]) & (cell["metric"] == "score")
    asked &= cell["edits_done"] >= ENOUGH_EDITS
    scores = cell[asked].set_index("edits_done")["value"].sort_index()
    below = scores < scores.cummax() / 2
    return float(below.idxmax()) if below.any() else float("nan")


def _published(
    paper: pd.DataFrame | None, layout: Layout, model: str, method: str, dataset: str
) -> dict[str, float]:
    """The paper's numbers for this cell; empty where it has none."""
    names = [
        layout.models[model]["paper_name"],
        layout.compared[method]["paper_name"],
        layout.datasets[dataset]["paper_name"],
    ]
    if paper is None or None in names:
        return {}
    found = paper[(paper[["model", "editor", "dataset"]] == names).all(axis=1)]
    return {} if found.empty else found.iloc[0].to_dict()


def caption(table: pd.DataFrame, layout: Layout) -> str:
    """Say what the numbers are: protocol, pipeline, edits, intervals."""
    n = sorted({int(n) for n in table["n"] if n})
    edits = " to ".join(str(x) for x in ([n[0]] if len(n) == 1 else [n[0], n[-1]])) if n else "no"
    pipeline = split_mode(layout.mode)[0] + in_turns(layout.mode)
    text = (
        f"{layout.title}. Pipeline {pipeline}, protocol {layout.protocol}, {edits} edits per "
        "cell; percent with 95% intervals over edits (bootstrap; exact at 0 and 100)"
    )
    if layout.consecutive:
        each = "turn" if in_turns(layout.mode) else "edit"
        text += f"; evaluated on the final model, Write: efficacy right after each {each}"
    if table[[f"{m.name}_tied" for m in table_columns("request")]].any(axis=None):
        text += (
            "; bold: the best, ≈: not distinguishable from it (paired bootstrap, Holm over the "
            "editors of the column)"
        )
    if table["n"].between(1, ENOUGH_EDITS - 1).any():
        text += f"; no best is marked among fewer than {ENOUGH_EDITS} edits"
    if table[[f"{m.name}_paper" for m in table_columns("request")]].notna().any(axis=None):
        text += "; in brackets the paper's number"
    if (table["score"].notna() & table["locality"].isna()).any():  # it has nothing to compare with
        text += f"; {layout.compared['original']['label']}: Score without Locality"
    if "half_after" in table:
        text += f"; {_HALF}: edits after which Score was below half of its best"
        text += f" from {ENOUGH_EDITS} on"
    for metric in _states(table):
        text += f"; {metric.label}: {metric.meaning} ({metric.unit})"
    return f"{text}.{_failures(table, layout)}"


def _failures(table: pd.DataFrame, layout: Layout) -> str:
    """Say which edits could not be made; their prompts were asked all the same."""
    rows = table[table["failed_edits"] > 0]
    counts = [
        f"{layout.models[row['model']]['label']}, {layout.compared[row['editor']]['label']}, "
        f"{layout.datasets[row['dataset']]['label']}: {int(row['failed_edits'])}"
        for _, row in rows.iterrows()
    ]
    return f" Edits that failed: {'; '.join(counts)}." if counts else ""


def _number(value: float, digits: int = 1) -> str:
    return MISSING if pd.isna(value) else f"{value:.{digits}f}"


def _states(table: pd.DataFrame) -> list[Metric]:
    """List the metrics of model states that a table shows."""
    return [metric for metric in table_columns("state") if metric.name in table]


def _state_label(metric: Metric) -> str:
    """Name a column whose best is not marked: a single measurement has no interval."""
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"


def _best(table: pd.DataFrame, metric: Metric, layout: Layout) -> pd.Series:
    """Mark the best edited model of each model and data set; a control is no rival.

    Too few edits have no best.
    """
    rivals = ~table["editor"].isin(["original", *layout.controls]) & (table["n"] >= ENOUGH_EDITS)
    groups = (metric.direction * table.loc[rivals, metric.name]).groupby(
        [table["model"], table["dataset"]]
    )
    best = metric.direction * groups.transform("max").reindex(table.index)
    return (table[metric.name] == best) & (groups.transform("count").reindex(table.index) > 1)


def _method_label(row: pd.Series, table: pd.DataFrame, layout: Layout) -> str:
    """Name a method, with its variant and its seed where the table shows several."""
    label = str(layout.compared[row["editor"]]["label"])
    same = table[table["editor"] == row["editor"]]
    if same["variant"].nunique() > 1:
        label += f", {row['variant']}"
    if same["seed"].nunique() > 1:
        label += f", seed {int(row['seed'])}"
    return label


def to_markdown(table: pd.DataFrame, layout: Layout) -> str:
    """Render for people: one block per data set, aligned for a terminal too."""
    marks = {metric: _best(table, metric, layout) for metric in table_columns("request")}
    header = ["Model", "Editor", *(metric.label for metric in marks)]
    header += ["Write"] * layout.consecutive + [_HALF] * ("half_after" in table)
    header += [*map(_state_label, _states(table)), "s/edit"]
    blocks = [f"**{caption(table, layout)}**"]
    for dataset, names in layout.datasets.items():
        lines = [header]
        for index, row in table[table["dataset"] == dataset].iterrows():
            cells = [_markdown_cell(row, m.name, bool(best[index])) for m, best in marks.items()]
            if layout.consecutive:
                cells.append(_number(row["write_efficacy"]))
            if "half_after" in table:
                cells.append(_number(row["half_after"], 0))
            cells += [_number(row[metric.name], metric.digits) for metric in _states(table)]
            cells.append(_number(row["seconds_per_edit"], 2))
            model = str(layout.models[row["model"]]["label"])
            lines.append([model, _method_label(row, table, layout), *cells])
        blocks.append(f"{names['label']}\n\n{markdown_table(lines)}")
    return "\n\n".join(blocks) + "\n"


def _markdown_cell(row: pd.Series, metric: str, best: bool) -> str:
    if pd.isna(row[metric]):
        return MISSING
    value = f"**{_number(row[metric])}**" if best else _number(row[metric])
    value += "≈" * bool(row[f"{metric}_tied"] and not best)
    text = f"{value} [{_number(row[f'{metric}_low'])}, {_number(row[f'{metric}_high'])}]"
    published = row[f"{metric}_paper"]
    return text if pd.isna(published) else f"{text} (paper {published:.2f})"


def tied(cell: Mapping[str, Any]) -> bool:
    """Whether a metric is not the best one, and of enough edits cannot be told from it."""
    return bool(cell["n"] >= ENOUGH_EDITS and cell["behind_p"] >= SIGNIFICANT)


def shown_difference(difference: float, low: float, high: float) -> str:
    """Return a difference with its interval, in points."""
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def markdown_table(lines: list[list[str]]) -> str:
    """Lay cells out as a Markdown table that is aligned in plain text too; the head first.

    Columns of numbers are aligned on the right where Markdown is rendered.
    """
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    ends = [":" if _is_numbers(column) else "-" for column in zip(*lines[1:], strict=True)]
    rule = "|" + "|".join("-" * (w + 1) + e for w, e in zip(widths, ends, strict=True)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def _is_numbers(cells: Iterable[str]) -> bool:
    """Whether every cell of a column begins with a number, or misses one."""
    return all(cell == MISSING or re.match(r"\**[-+]?\d", cell) for cell in cells)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≈": r"$\approx$",
    "×": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def escape_latex(text: str) -> str:
    """Make any text printable by LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: pd.DataFrame, layout: Layout) -> str:
    """Render in the paper's layout (booktabs): methods down, data sets and metrics across."""
    marks = {metric: _best(table, metric, layout) for metric in table_columns("request")}
    states = _states(table)
    n_metrics, n_sets = len(marks) + len(states), len(layout.datasets)
    labels = [escape_latex(str(d["label"])) for d in layout.datasets.values()]
    heads = " & ".join(rf"\multicolumn{{{n_metrics}}}{{c}}{{{label}}}" for label in labels)
    names = " & ".join(
        [*(metric.label for metric in marks), *(escape_latex(_state_label(m)) for m in states)]
    )
    lines = [
        r"\begin{table*}",
        r"\centering\small",
        rf"\caption{{{escape_latex(caption(table, layout))}}}",
        rf"\begin{{tabular}}{{ll{'r' * n_metrics * n_sets}}}",
        r"\toprule",
        rf"Model & Editor & {heads} \\",
        rf" & & {' & '.join([names] * n_sets)} \\",
    ]
    for model, of_model in table.groupby("model", sort=False):
        lines.append(r"\midrule")
        label = escape_latex(str(layout.models[model]["label"]))
        for _, of_method in of_model.groupby(
            ["editor", "variant", "seed"], sort=False, dropna=False
        ):
            cells = []
            for index, row in of_method.iterrows():
                cells += [_latex_cell(row, m.name, bool(best[index])) for m, best in marks.items()]
                cells += [_latex_number(row[m.name], m.digits) for m in states]
            name = escape_latex(_method_label(of_method.iloc[0], table, layout))
            lines.append(rf"{label} & {name} & {' & '.join(cells)} \\")
            label = ""
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _latex_number(value: float, digits: int = 1) -> str:
    return "--" if pd.isna(value) else rf"${_number(value, digits)}$"


def _latex_cell(row: pd.Series, metric: str, best: bool) -> str:
    if pd.isna(row[metric]):
        return _latex_number(row[metric])
    value = _number(row[metric])
    value = rf"\mathbf{{{value}}}" if best else value
    value += r"^{\approx}" * bool(row[f"{metric}_tied"] and not best)
    low, high = _number(row[f"{metric}_low"]), _number(row[f"{metric}_high"])
    text = rf"${value}_{{[{low},\,{high}]}}$"
    published = row[f"{metric}_paper"]
    return text if pd.isna(published) else rf"{text} ({published:.2f})"
