"""The table of metrics, and that one entry in it is all that a metric needs."""

import re
from pathlib import Path

import pandas as pd

from kmebench.evaluation import protocols
from kmebench.evaluation.protocols import METRICS, metrics_of, table_columns
from kmebench.evaluation.schema import PREDICTIONS
from kmebench.evaluation.score import score_run, score_states
from kmebench.evaluation.statistics import request_values
from kmebench.io.files import write_json
from kmebench.reporting.figure_tables import survival
from kmebench.reporting.tables import Layout, to_latex, to_markdown, wide_table
from tests.conftest import RUN

#: The entries that docs/extending.md shows, to the letter.
PAGE = Path("docs/extending.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"```python\n(Metric\(.*?\n\))\n```", PAGE, re.DOTALL)
FROM_DOCS = {m.name: m for m in (eval(entry, vars(protocols)) for entry in ENTRIES)}

#: A run of two requests: the paraphrases of the second are half right.
ANSWERS = [
    ("0", "edit", [1]),
    ("0", "paraphrase", [1]),
    ("1", "edit", [1]),
    ("1", "paraphrase", [1]),
    ("1", "paraphrase", [2]),
]


def predictions():
    rows = []
    for case_id, kind, ids in ANSWERS:
        row = dict.fromkeys(PREDICTIONS.names)
        row |= {"case_id": case_id, "position": int(case_id), "kind": kind, "target_ids": [1]}
        row |= {"before_ids": [3], "after_ids": ids, "when": "final", "edits_done": 2}
        rows.append(row)
    return pd.DataFrame(rows)


def shown(scored):
    """A table and the figure over edits, from scored runs of two editors."""
    columns = ["behind_p", "seconds_per_edit", "failed_edits"]
    metrics = pd.concat(
        scored.assign(**RUN | {"method": method}, **dict.fromkeys(columns, 0.0))
        for method in ("pac", "rome")
    )
    names = {"m": {"label": "M", "paper_name": None}}
    datasets, methods = {"d": names["m"]}, dict.fromkeys(("pac", "rome"), names["m"])
    layout = Layout("T", "token", "consecutive", names, datasets, methods)
    labels = {"models": {"m": "M"}, "datasets": {"d": "D"}, "methods": {"pac": "A", "rome": "B"}}
    table = wide_table(metrics, None, layout)
    figure = survival(metrics.assign(when="final"), labels, "token")
    return to_markdown(table, layout), to_latex(table, layout), figure


def test_a_metric_of_requests_is_one_entry(monkeypatch):
    monkeypatch.setitem(METRICS, "worst", FROM_DOCS["worst"])
    values = request_values(predictions(), "token")
    assert values["worst"].tolist() == [1.0, 0.0]
    assert values["generality"].tolist() == [1.0, 0.5]
    scored = score_run(predictions(), {"resamples": 10, "seed": 0})
    markdown, latex, figure = shown(scored[scored["protocol"] == "token"])
    assert "| Worst paraphrase " in markdown
    assert " 50.0 [" in markdown
    assert "& Worst" in latex
    assert "Worst paraphrase" in set(figure["metric"])


def test_a_metric_of_states_is_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "entropy", FROM_DOCS["entropy"])
    state = {column: 1.0 for metric in metrics_of("state") for column in metric.columns}
    write_json(tmp_path / "health.json", [state | {"edits_done": 2, "tokens": 9, "entropy": 4.56}])
    states = score_states(tmp_path / "health.json")
    assert states.set_index("metric").loc["entropy", ["value", "n"]].tolist() == [4.56, 9]
    scored = pd.concat([score_run(predictions(), {"resamples": 10, "seed": 0}), states])
    markdown, latex, figure = shown(scored[scored["protocol"].isin(["token", "health"])])
    assert "Entropy: entropy of what is generated (nats)" in markdown
    assert "| Entropy ↑ " in markdown
    assert "| 4.56 " in markdown
    assert r"Entropy $\uparrow$" in latex
    assert set(figure.loc[figure["metric"] == "Entropy", "mean"]) == {4.56}


def test_the_table_of_metrics_is_consistent():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert set(metric.parts) <= set(METRICS)
        assert (metric.score is protocols._has_no_score) == bool(metric.parts)
        assert not metric.in_paper or metric.column is not None
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
    columns = [metric.column for per in ("request", "state") for metric in table_columns(per)]
    assert columns == sorted(set(columns))
