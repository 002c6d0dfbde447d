"""An editor and the best of the others against model size."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from kmebench.errors import ConfigError
from kmebench.planning.appearance import Style
from kmebench.planning.config import read_checked_config
from kmebench.planning.reported import Reported
from kmebench.reporting.drawing import drawn
from kmebench.reporting.findings import findings_markdown
from kmebench.reporting.paper import COLUMNS
from kmebench.reporting.sizes import BEST, against_size, sizes_table

LABELS = {
    "models": {"small": "Small", "large": "Large"},
    "datasets": {"zsre": "ZsRE"},
    "methods": {"pac": "PAC", "memit": "MEMIT", "rome": "ROME", "none": "No edit"},
}
PAPER_NAMES = {"datasets": {"zsre": "ZsRE"}, "methods": {"pac": "Ours", "memit": "MEMIT"}}
STYLES = {"PAC": Style("#0072B2", "o")}


def ours():
    """Of the small model MEMIT is the best of the others, of the large one ROME."""
    scores = {("small", "pac"): 50, ("small", "memit"): 70, ("small", "rome"): 60}
    scores |= {("large", "pac"): 80, ("large", "memit"): 20, ("large", "rome"): 30}
    scores |= {(model, name): 99 for model in ("small", "large") for name in ("none", "original")}
    rows = [
        {"model": model, "editor": editor, "variant": "default", "dataset": "zsre", "n": 50}
        | {"mode": "batch", "locality": score - 10, "generality": score - 5, "score": score}
        | {"score_low": score - 3, "score_high": score + 4}
        for (model, editor), score in scores.items()
    ]
    other = {"model": "large", "editor": "rome", "variant": "layer=3", "dataset": "zsre", "n": 50}
    not_run = {"model": "large", "editor": "memit", "variant": "default", "dataset": "zsre-30"}
    return pd.DataFrame([*rows, other | {"mode": "batch", "score": 98}, not_run | {"n": 0}])


def paper():
    rows = [("Ours", 90, 80, 70, 80), ("ROME", 9, 8, 7, 8), ("MEMIT", 30, 20, 10, 20)]
    rows.append(("Original Model", 95, 95, 95, 95))
    return pd.DataFrame([("Llama (6.5B)", e, "ZsRE", *n) for e, *n in rows], columns=COLUMNS)


def table(*tables):
    parameters = {"small": 135_000_000, "large": 500_000_000}
    pairs = [(made, paper()) for made in tables or [ours()]]
    return sizes_table(pairs, LABELS, parameters, "pac", PAPER_NAMES, ["none"])


def test_the_best_of_the_others_is_chosen_by_score_on_every_model_here_and_in_the_paper():
    scores = table().query("metric == 'Score'")
    found = scores[["source", "series", "editor", "billions", "mean"]].to_numpy().tolist()
    assert found == [
        ["here", "PAC", "PAC", 0.135, 50],
        ["here", BEST, "MEMIT", 0.135, 70],
        ["here", "PAC", "PAC", 0.5, 80],
        ["here", BEST, "ROME", 0.5, 30],
        ["paper", "PAC", "PAC", 6.5, 80],
        ["paper", BEST, "MEMIT", 6.5, 20],
    ]
    here = scores[scores["source"] == "here"]
    assert (here["high"] - here["low"] == 7).all()
    assert scores[scores["source"] == "paper"][["low", "high", "n"]].isna().all(axis=None)
    other = table().query("source == 'paper' and series == @BEST").set_index("metric")["mean"]
    assert other.to_dict() == {"Locality": 20, "Generality": 10, "Score": 20}


def test_a_table_of_the_paper_that_stands_beside_two_of_ours_counts_once():
    small = ours()["model"] == "small"
    parts = table(ours()[small], ours()[~small])
    keys = ["source", "series", "model", "metric"]
    assert not parts.duplicated(keys).any()
    pd.testing.assert_frame_equal(
        parts.sort_values(keys, ignore_index=True), table().sort_values(keys, ignore_index=True)
    )


def test_lines_go_from_small_to_large_and_grey_marks_are_named():
    figure = against_size(table(), STYLES)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{m} · ZsRE, Batch editing · 50 edits" for m in ("Locality", "Generality", "Score")
    ]
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in figure.axes[2].get_lines()}
    assert ((0.0, 50.0), (1.0, 80.0)) in lines
    assert ((0.0, 70.0), (1.0, 30.0)) in lines
    drawn = {container.get_label() for container in figure.axes[2].containers}
    assert drawn == {"PAC, here", "PAC, paper", f"{BEST}, here", "MEMIT, paper"}
    ticks = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert ticks == ["135M", "500M", "6.5B"]
    names = figure.axes[2].texts
    assert [text.get_text() for text in names] == ["MEMIT", "ROME", "MEMIT"]
    others = table().query("series == @BEST and metric == 'Score'")
    ends = others["high"].fillna(others["mean"])  # names stand above intervals
    assert [text.xy[1] for text in names] == ends.tolist()
    assert ends.iloc[0] > others["mean"].iloc[0]


OVERLAY = """
models:
  one: {label: One, source: {source: folder, path: one}, dtype: float32}
experiments:
  table1: {models: [smollm2-135m, one], datasets: [openfacts-zsre], methods: [pac, memit]}
figures:
  sizes: {title: Size, kind: sizes, tables: [table1], method: pac}
"""


def test_a_figure_of_sizes_is_told_the_sizes_and_refuses_a_model_without(tmp_path):
    overlay = tmp_path / "sizes.yaml"
    overlay.write_text(OVERLAY, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"figures\.sizes .*give models\.one\.shape"):
        read_checked_config(Path("config.yaml"), [overlay])
    shape = "shape: {layers: 20, width: 8, ffn_width: 16, parameters: 1000}"
    overlay.write_text(OVERLAY.replace("float32}", f"float32, {shape}}}"), encoding="utf-8")
    config = read_checked_config(Path("config.yaml"), [overlay])
    spec = Reported(config, tmp_path).figure(SimpleNamespace(figure="sizes"))
    assert spec["parameters"] == {"one": 1000, "smollm2-135m": 134515008}
    path = tmp_path / "table.csv"
    renamed = {"small": "one", "large": "smollm2-135m"}
    made = ours().assign(model=lambda t: t["model"].map(renamed), dataset="openfacts-zsre")
    made[made["editor"].isin(["pac", "memit"])].to_csv(path, index=False)
    table, figure = drawn(spec | {"papers": [None]}, [str(path)])
    assert sorted(set(table["billions"])) == [1e-6, 0.134515008]
    assert len(figure.axes) == 3


def test_findings_of_several_models_stand_side_by_side():
    rows = [("C", "Small", "ZsRE", "holds", 50), ("C", "Large", "ZsRE", "does not hold", 30)]
    rows += [("C", "Large", "CounterFact", "holds", 20), ("D", "Small", "ZsRE", "open", 50)]
    found = pd.DataFrame(rows, columns=["claim", "model", "dataset", "verdict", "n"])
    found = found.assign(where="w", paper="p", paper_edits=pd.NA, found="f", edits=found["n"])
    lines = findings_markdown(found).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert table[0] == ["Claim (verdict, edits)", "Small", "Large"]
    assert table[2] == ["C", "holds (50)", "does not hold (30); holds (20)"]
    assert table[3] == ["D", "open (50)", "–"]
    alone = findings_markdown(found[found["model"] == "Small"])
    assert "Claim (verdict" not in alone
