"""Figures with one mark per editor."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kmebench.errors import KMEBenchError
from kmebench.planning import grid
from kmebench.planning.appearance import Style
from kmebench.planning.config import read_checked_config
from kmebench.planning.reported import Reported
from kmebench.reporting import figure_tables, trade_offs
from kmebench.reporting.panels import save
from tests.conftest import RUN

REFERENCE = "reference/smollm2-135m-editors"
STYLES = {"A": Style("#0072B2", "o"), "B": Style("#D55E00", "s"), "No edit": Style("#767676", "o")}
LABELS = {
    "models": {"m": "Model"},
    "datasets": {"d": "Data"},
    "methods": {"pac": "PAC", "none": "No edit"},
}


def both(x, y, names=("x", "y")):
    """Two editors with two numbers each, and intervals of ±5."""
    table = pd.DataFrame({"model": "M", "dataset": "D", "editor": ["A", "B"]})
    for name, values in zip(names, (x, y), strict=True):
        ends = {f"{name}_low": np.array(values) - 5, f"{name}_high": np.array(values) + 5}
        table = table.assign(**{name: values} | ends)
    return table


def marks(axes):
    return [line for line in axes.get_lines() if line.get_marker() not in ("None", "|", "_", "")]


def test_one_number_against_another_is_a_named_point_with_two_intervals_for_every_editor():
    table = both([10.0, 90.0], [80.0, 20.0])
    figure = trade_offs.one_against_another(table, "x", "y", STYLES)
    (axes,) = figure.axes
    assert [m.get_xydata().tolist() for m in marks(axes)] == [[[10.0, 80.0]], [[90.0, 20.0]]]
    assert all(c.has_xerr and c.has_yerr for c in axes.containers)
    assert [text.get_text() for text in axes.texts] == ["A", "B"]
    assert [text.get_color() for text in axes.texts] == ["#0072B2", "#D55E00"]


def test_what_no_data_set_has_prompts_for_leaves_no_mark_or_the_figure_says_so(tmp_path):
    rows = [
        RUN
        | {"mode": "batch", "method": method, "protocol": "token", "when": "final"}
        | {"metric": name, "value": 0.5, "low": 0.4, "high": 0.6, "n": 30, "seconds_per_edit": 1.0}
        for method in ("pac", "none")
        for name in ("efficacy", "locality")
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "m")
    runs = [RUN | {"mode": "batch", "method": method} for method in ("pac", "none")]
    table = figure_tables.trade_offs([tmp_path / "m"], runs, LABELS, "token", ["none"])
    assert table[["Generality", "Score", "Score_low"]].isna().all(axis=None)
    styles = {"PAC": STYLES["A"], "No edit": STYLES["No edit"]}
    (axes,) = trade_offs.overview(table, styles).axes
    assert [mark.get_markersize() for mark in marks(axes)] == [trade_offs.SMALL] * 2
    with pytest.raises(KMEBenchError, match="no run has the numbers of this figure"):
        trade_offs.cost_quality(table, styles)


def test_the_overview_shows_generality_as_area_and_the_floor_as_a_line():
    table = both([90.0, 20.0], [50.0, 100.0], ("Efficacy", "Locality"))
    table = table.assign(editor=["A", "No edit"], control=[False, True], Generality=[100.0, 0.0])
    table = table.assign(cell="D", pipeline="Batch editing", n=50)
    (axes, *_) = trade_offs.overview(table, STYLES).axes
    large, small = marks(axes)
    assert (large.get_markersize(), small.get_markersize()) == (trade_offs.LARGE, trade_offs.SMALL)
    assert [20.0, 20.0] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert "50 edits" in axes.get_title(loc="left")


def test_editors_on_the_same_place_share_a_name():
    figure = trade_offs.one_against_another(both([90.0, 90.0], [80.0, 80.0]), "x", "y", STYLES)
    assert [text.get_text() for text in figure.axes[0].texts] == ["A, B"]


def test_trade_offs_are_final_numbers_of_the_given_runs_in_percent(tmp_path):
    row = RUN | {"protocol": "token", "when": "final", "metric": "efficacy", "n": 50}
    row |= {"value": 0.5, "low": 0.4, "high": 0.6, "seconds_per_edit": 2.0}
    rows = [row, row | {"metric": "score", "value": 0.7}]
    rows += [row | other for other in ({"when": "write"}, {"protocol": "wild"}, {"seed": 9})]
    pd.DataFrame(rows).to_parquet(tmp_path / "metrics.parquet")
    files = [str(tmp_path / "metrics.parquet")]
    (found,) = figure_tables.trade_offs(files, [RUN], LABELS, "token", ["none"]).to_dict("records")
    assert found["Efficacy"] == pytest.approx(50)
    assert (found["Efficacy_low"], found["Efficacy_high"]) == pytest.approx((40, 60))
    assert found["Score"] == pytest.approx(70)
    assert (found["editor"], found["control"], found["cell"]) == ("PAC", False, "Data")
    assert (found["seconds"], found["n"]) == (2.0, 50)


def numbers(svg):
    return np.array(re.findall(r"-?\d+\.?\d*", svg.split("</metadata>")[1]), dtype=float)


def test_the_readmes_picture_is_made_of_the_reference_results(tmp_path):
    """`make tables` makes it; numbers of layout may differ in the last digits elsewhere."""
    overlays = [Path("config/real.yaml"), Path("config/reference/editors.yaml")]
    reported = Reported(read_checked_config(Path("config.yaml"), overlays), REFERENCE)
    spec = reported.figure(type("Wildcards", (), {"figure": "overview"}))
    files = [f"{REFERENCE}/metrics/{name}.parquet" for name in spec["experiments"]]
    controls = grid.controls(reported.config)
    labels = (spec["runs"], spec["labels"], "token", controls)
    figure = trade_offs.overview(figure_tables.trade_offs(files, *labels), spec["styles"])
    save(figure, tmp_path / "overview.svg")
    made, kept = (
        path.read_text(encoding="utf-8")
        for path in (tmp_path / "overview.svg", Path("docs/images/overview.svg"))
    )
    assert re.findall("<!-- .* -->", made) == re.findall("<!-- .* -->", kept)
    assert numbers(made) == pytest.approx(numbers(kept), abs=0.5)
