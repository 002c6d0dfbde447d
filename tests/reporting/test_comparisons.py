"""Pairs of runs."""

import numpy as np
import pandas as pd
import pytest

from kmebench.evaluation.frames import write_frame
from kmebench.evaluation.schema import PREDICTIONS
from kmebench.reporting.comparisons import compare, comparison_markdown

STATISTICS = {"resamples": 200, "seed": 0}


KINDS = ("edit", "paraphrase", "locality")


def run(path, right, kinds=KINDS):
    """Predictions of a prompt of each kind per request; ``right[i]`` says which are as wanted."""
    rows = []
    for i, flags in enumerate(right):
        for kind, good in zip(kinds, flags, strict=True):
            rows.append(
                {
                    "case_id": str(i),
                    "position": i,
                    "kind": kind,
                    "prompt": "p",
                    "target": "t",
                    "target_ids": [1],
                    "when": "final",
                    "edits_done": len(right),
                    "batch": 0,
                    "before_ids": [1],
                    "after_ids": [1 if good else 2],
                    "target_new_logprob_before": np.nan,
                    "target_new_logprob_after": np.nan,
                    "target_true_logprob_before": np.nan,
                    "target_true_logprob_after": np.nan,
                    "free_before_ids": None,
                    "free_after_ids": None,
                    "wild_before": None,
                    "wild_after": None,
                }
            )
    write_frame(pd.DataFrame(rows), PREDICTIONS, path)


@pytest.fixture
def table(tmp_path):
    run(tmp_path / "a", [(1, 1, 1)] * 16 + [(1, 0, 1)] * 4)
    run(tmp_path / "b", [(1, 0, 1)] * 20)
    pair = {"question": "?", "model": "M", "dataset": "D"}
    pairs = [pair | {"name": "x", "a": "A", "b": "B"}, pair | {"name": "y", "a": "A", "b": "A"}]
    files = {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}
    return compare(pairs, files, "token", STATISTICS)


def test_differences_are_paired_and_the_score_is_the_mean_of_three(table):
    x = table[table["name"] == "x"].set_index("metric")
    assert x["difference"].to_dict() == pytest.approx(
        {"efficacy": 0, "generality": 80, "locality": 0, "score": 80 / 3}
    )
    assert x.loc["efficacy", ["low", "high"]].tolist() == [0, 0]
    assert 40 <= x.loc["generality", "low"] < 80 < x.loc["generality", "high"] <= 100
    assert x["n"].unique().tolist() == [20]


def test_only_what_is_away_from_zero_is_bold(table):
    lines = comparison_markdown(table, "Audit", "token").splitlines()
    (x, y) = [line for line in lines if line.startswith("| ?")]
    assert "**+80.0**" in x
    assert x.count("**") == 4  # generality and score
    assert "**" not in y
    assert "20 edits" in lines[0]
    assert "fewer" not in lines[0]


def test_too_few_edits_make_nothing_bold(table):
    text = comparison_markdown(table.assign(n=19), "Audit", "token")
    assert text.startswith("**Audit. ")
    assert text.count("**") == 2  # the caption alone
    assert "none is bold among fewer than 20 edits.**" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("absent", "cells"), [("paraphrase", [2, 4]), ("locality", [3])], ids=lambda x: str(x)
)
def test_what_a_data_set_has_no_prompts_for_is_said(tmp_path, absent, cells):
    """Without paraphrases there is no Score either."""
    kinds = [kind for kind in KINDS if kind != absent]
    run(tmp_path / "a", [(1, 1)] * 20, kinds)
    run(tmp_path / "b", [(0, 1)] * 20, kinds)
    pair = {"question": "?", "model": "M", "dataset": "D", "name": "x", "a": "A", "b": "B"}
    files = {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}
    table = compare([pair], files, "token", STATISTICS)
    assert set(table.loc[table["difference"].isna(), "n"]) == {0}
    caption, *_, line = comparison_markdown(table, "Audit", "token").splitlines()
    assert "20 edits;" in caption
    assert "fewer" not in caption
    assert caption.endswith("; –: the data set has no such prompts.**")
    shown = [cell.strip() for cell in line.strip("|").split("|")][3:]
    assert [k for k, cell in enumerate(shown, start=1) if cell == "–"] == cells
    assert shown[0] == "**+100.0** [+100.0, +100.0]"
