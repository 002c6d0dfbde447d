"""The numbers, sentences, picture and fact on the page of a results folder."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from kmebench.reporting import overview
from kmebench.reporting.headlines import headlines
from kmebench.reporting.one_fact import look_at
from kmebench.reporting.overview import BOTTOM, LEFT, RIGHT, TOP, panels, place_x, radius
from kmebench.reporting.page_numbers import explorer, in_order, main_cells, once

LABELS = {
    "models": {"m": "Model"},
    "datasets": {"z": "ZsRE", "c": "CounterFact"},
    "methods": {"none": "No edit", "rome": "ROME", "pac": "PAC"},
}


def metric(method, name, value, *, dataset="z", protocol="token", experiment="table1", **more):
    row = {"experiment": experiment, "model": "m", "dataset": dataset, "mode": "batch"}
    row |= {"method": method, "variant": "default", "seed": 0, "protocol": protocol}
    row |= {"when": "final", "edits_done": 30, "metric": name, "value": value, "n": 30}
    row |= {"low": value - 0.1, "high": value + 0.1, "behind_p": 0.01}
    return row | more


def metrics():
    """PAC and the floor on two data sets, CounterFact first; ROME on one; one sweep."""
    names = ("efficacy", "generality", "locality", "score")
    rows = [metric("original", "score", 0.1, edits_done=0)]
    rows += [metric("pac", name, 0.5, dataset="c") for name in names]
    rows += [metric("pac", name, 0.6, behind_p=0.2) for name in names]
    rows += [metric("none", name, 0.2, behind_p=np.nan) for name in names]
    rows += [metric("rome", name, 0.7, behind_p=np.nan) for name in names]
    rows += [metric("pac", "score", 0.9, protocol="wild")]
    sweep = {"experiment": "sweep", "behind_p": 0.03}
    rows += [metric("pac", name, 0.6, **sweep) for name in names]
    rows += [metric("pac", "score", 0.8, variant="paths=5+lambda=0.0", **sweep)]
    return pd.DataFrame(rows)


def test_a_run_of_two_experiments_counts_in_that_with_most_rivals():
    kept = once(metrics()[::-1].reset_index(drop=True))
    pac = kept[(kept["method"] == "pac") & (kept["dataset"] == "z") & (kept["metric"] == "score")]
    found = pac.set_index(["protocol", "variant"])["experiment"].to_dict()
    assert found == {
        ("token", "default"): "table1",
        ("wild", "default"): "table1",
        ("token", "paths=5+lambda=0.0"): "sweep",
    }


def test_main_cells_are_the_configured_edits_in_percent_in_the_order_of_the_config():
    cells = main_cells(in_order(once(metrics()), LABELS), LABELS, ["none"], 0)
    assert cells[["dataset", "editor"]].to_numpy().tolist() == [
        ["ZsRE", "No edit"],
        ["ZsRE", "ROME"],
        ["ZsRE", "PAC"],
        ["CounterFact", "PAC"],
    ]
    assert cells["score"].tolist() == pytest.approx([20, 70, 60, 50])
    assert cells["efficacy_high"].tolist() == pytest.approx([30, 80, 70, 60])
    assert cells["tied"].tolist() == [False, False, True, False]
    assert cells["control"].tolist() == [True, False, False, False]
    assert main_cells(metrics(), LABELS, [], seed=7).empty


def test_a_data_set_without_paraphrases_has_cells_and_no_best():
    asked = metrics()[lambda table: table["metric"].isin(["efficacy", "locality"])]
    cells = main_cells(in_order(once(asked), LABELS), LABELS, ["none"], 0)
    assert cells["efficacy"].tolist() == pytest.approx([20, 70, 60, 50])
    assert cells[["generality", "score", "score_low", "score_high"]].isna().all(axis=None)
    assert cells["n"].tolist() == [30] * 4
    assert not cells["tied"].any()
    assert headlines(cells, pd.DataFrame()) == []


def test_every_time_of_asking_has_a_name_of_its_own():
    names = {
        ("final", 300): "after all edits",
        ("write", 300): "right after each edit",
        ("milestone", 100): "after 100 edits",
        ("newest", 300): "right after each of the last 100 of 300 edits",
    }
    rows = [metric("pac", "efficacy", 0.5, when=m, edits_done=n) for m, n in names]
    told = explorer(in_order(once(pd.DataFrame(rows)), LABELS), LABELS, seed=0)
    when = [name for name, _ in told["columns"]].index("when")
    assert [row[when] for row in told["rows"]] == list(names.values())


def test_the_table_of_all_numbers_holds_every_protocol_and_variant_once():
    told = explorer(in_order(once(metrics()), LABELS), LABELS, seed=0)
    names = [name for name, _ in told["columns"]]
    assert [name for name, *_ in told["metrics"]] == ["efficacy", "locality", "generality", "score"]
    rows = [dict(zip([*names, "n", "e", "l", "g", "s"], row, strict=True)) for row in told["rows"]]
    found = {(r["editor"], r["dataset"], r["protocol"], r["settings"]): r["s"] for r in rows}
    assert len(found) == len(rows) == 7
    assert found["PAC", "ZsRE", "wild", "default"] == pytest.approx([90, 80, 100])
    assert found["PAC", "ZsRE", "token", "paths=5, lambda=0.0"] == pytest.approx([80, 70, 90])
    wild = next(row for row in rows if row["protocol"] == "wild")
    assert wild["e"] is None
    assert rows[0]["editor"] == "Original model"
    assert json.loads(json.dumps(told, allow_nan=False))["begin"]["dataset"] == "ZsRE"


def cell(editor, score, *, tied=False, n=30, control=False, **more):
    row = {"model": "Model", "dataset": "ZsRE", "mode": "batch", "editor": editor, "score": score}
    row |= {"score_low": score - 1, "score_high": score + 1, "tied": tied, "n": n}
    return row | {"control": control} | more


def gap(question, editor, difference, other="Full-C", *, n=30, **more):
    row = {"model": "Model", "dataset": "ZsRE", "mode": "batch", "question": question}
    row |= {"editor": editor, "other": other, "difference": difference, "n": n}
    return row | {"low": difference - 2, "high": difference + 2} | more


CELLS = [
    cell("No edit", 99.0, control=True),
    cell("PAC", 80.0, tied=True),
    cell("MEMIT", 79.5, tied=True),
    cell("RECT", 79.0, tied=True),
    cell("KN", 1.0),
]
GAPS = [gap("forgets", "KN", -1.0), gap("forgets", "LoRA", -40.0), gap("against", "PAC", -3.0)]


def sentences(cells, gaps):
    found = headlines(pd.DataFrame(cells), pd.DataFrame(gaps))
    return {headline.title: headline.sentences for headline in found}


def test_sentences_name_the_best_its_ties_and_who_forgets():
    found = {k: [s.replace("\xa0", " ") for s in v] for k, v in sentences(CELLS, GAPS).items()}
    assert found == {
        "Who is best": [
            "ZsRE, batch: PAC has the best Score, 80.0 [79.0, 81.0]; MEMIT and RECT cannot be "
            "told from it. n = 30."
        ],
        "Who forgets": [
            "ZsRE: LoRA loses most from batch to consecutive editing, −40.0 [−42.0, −38.0] points "
            "of Score. n = 30."
        ],
        "PAC against Full-C": [
            "ZsRE, batch: PAC scores less than Full-C, −3.0 [−5.0, −1.0] points. n = 30."
        ],
    }


@pytest.mark.parametrize(
    ("difference", "words"),
    [(3.0, "scores more than"), (-3.0, "scores less than"), (1.9, "cannot be told from")],
)
def test_a_difference_whose_interval_holds_zero_is_none(difference, words):
    (text,) = sentences(CELLS, [gap("against", "PAC", difference)])["PAC against Full-C"]
    assert f"PAC {words} Full-C" in text


def test_nobody_forgets_whose_interval_holds_zero():
    (text,) = sentences(CELLS, [gap("forgets", "KN", -1.0)])["Who forgets"]
    assert "no editor scores less in consecutive than in batch editing" in text


def test_many_ties_are_counted_and_models_are_named_where_there_are_several():
    many = [cell(f"E{k}", 50.0 + k, tied=True, model=m) for m in ("A", "B") for k in range(7)]
    first, _ = sentences(many, [])["Who is best"]
    assert first.startswith("A, ZsRE, batch: E6 has")
    assert "; 6 others cannot be told from it" in first


def test_an_exact_tie_with_the_best_is_named():
    """Which of two equal ones is compared with the other is chance."""
    for ties in ((True, False), (False, True)):
        rows = [cell(name, 80.0, tied=tie) for name, tie in zip(("A", "B"), ties, strict=True)]
        (text,) = sentences([*rows, cell("C", 60.0)], [])["Who is best"]
        assert "; B cannot be told from it" in text


def test_fewer_than_twenty_edits_make_no_claim():
    few = [row | {"n": 19} for row in CELLS]
    ((title, (text,)),) = sentences(few, [row | {"n": 19} for row in GAPS]).items()
    assert title == "Too few edits to judge"
    assert "19 edits" in text
    assert not any(editor in text for editor in ("PAC", "KN", "LoRA"))
    assert headlines(pd.DataFrame(), pd.DataFrame()) == []


def test_sentences_hold_25_words_at_most():
    many = [cell(f"Editor{k}", 80.0 - k, tied=True) for k in range(5)]
    few = [row | {"n": 4} for row in CELLS]
    texts = itertools.chain(*sentences(many, GAPS).values(), *sentences(few, []).values())
    for sentence in itertools.chain(*(re.split(r"(?<=[.;]) ", text) for text in texts)):
        assert len(re.sub(r"\[.*?\]", "", sentence).split()) <= 25, sentence


def mark(editor, efficacy, locality, generality=50.0):
    row = {"model": "Model", "dataset": "ZsRE", "mode": "batch", "method": editor.lower()}
    values = {"efficacy": efficacy, "locality": locality, "generality": generality, "score": 50.0}
    for name, value in values.items():
        row |= {name: value, f"{name}_low": value - 5, f"{name}_high": value + 5}
    return row | {"editor": editor, "control": False, "n": 30}


def drawn(*rows):
    (panel,) = panels(pd.DataFrame(rows), dict.fromkeys(("A", "B", "C"), "#000000"))
    return panel, {mark.editor: mark for mark in panel.marks}


def test_marks_lie_where_their_numbers_say():
    panel, marks = drawn(mark("A", 0, 0), mark("B", 50, 100, 100), mark("C", 100, 50, 0))
    assert panel.title == "ZsRE · batch"
    assert marks["A"].x < marks["B"].x < marks["C"].x
    assert marks["B"].x == pytest.approx((marks["A"].x + marks["C"].x) / 2)
    assert marks["B"].y < marks["C"].y < marks["A"].y  # Locality is upwards, y downwards
    assert marks["B"].across == (place_x(45), place_x(55))
    assert [m.radius for m in panel.marks] == sorted((m.radius for m in panel.marks), reverse=True)
    for found in marks.values():
        assert LEFT < found.x - found.radius < found.x + found.radius < RIGHT
        assert TOP < found.y - found.radius < found.y + found.radius < BOTTOM
    assert "Efficacy 50.0 [45.0, 55.0]" in marks["B"].says
    assert radius(-1) == radius(0) < radius(1)
    assert radius(25) - radius(0) == pytest.approx((radius(100) - radius(0)) / 2, abs=0.1)


def test_marks_on_one_another_share_a_name():
    _, marks = drawn(mark("A", 90, 90), mark("B", 90, 90), mark("C", 10, 10))
    assert [m.name and m.name.lines for m in map(marks.get, "ABC")] == [("A, B",), None, ("C",)]


def test_a_long_name_takes_lines_around_its_place(monkeypatch):
    monkeypatch.setattr(overview, "place", lambda *_: np.array([[200.0, 150.0]]))
    _, marks = drawn(*(mark(editor, 90, 90) for editor in "ABC"))
    name = marks["A"].name
    assert name.lines == ("A, B,", "C")
    assert [name.y + k * overview.LINE for k in range(2)] == [143, 157]


def test_an_editor_without_locality_is_not_drawn():
    (panel,) = panels(pd.DataFrame([mark("A", 1, 2), mark("B", 1, float("nan"))]), {"A": "#000000"})
    assert [found.editor for found in panel.marks] == ["A"]
    assert panels(pd.DataFrame(), {}) == []


def predictions(*answers):
    """Records "1", "2", ...: texts of edit, paraphrase and neighbours; None: not asked."""
    kinds = ("edit", "paraphrase", "locality", "locality", "locality")
    rows = [
        {
            "case_id": str(record),
            "kind": kind,
            "prompt": f"{kind} {k}?",
            "target": "Rome",
            "when": when,
            "wild_before": "Paris",
            "wild_after": text if when == "final" else "elsewhere",
        }
        for record, texts in enumerate(answers, start=1)
        for when in ("write", "final")
        for k, (kind, text) in enumerate(zip(kinds, texts, strict=False))
    ]
    return pd.DataFrame(rows)


PAC = predictions(["Lyon", "Lyon"], ["Rome, in Italy", " Lyon", "Paris", "", "x"], ["Rome"])
KN = predictions(["Rome"], ["", "Rome", "Oslo", "Paris", "x"], ["Rome"])


def test_the_fact_is_the_first_whose_edit_succeeded():
    fact = look_at({"PAC": PAC, "KN": KN}, "PAC", None)
    assert (fact.case_id, fact.target) == ("2", "Rome")
    shown = [(q.name, q.prompt) for q in fact.questions]
    assert shown[:2] == [("Edit", "edit 0?"), ("Paraphrase", "paraphrase 1?")]
    assert shown[2:] == [("Neighbour", "locality 2?"), ("Neighbour", "locality 3?")]
    said = {editor: [(a.text, a.right) for a in answers] for editor, answers in fact.after.items()}
    assert said == {
        "PAC": [("Rome, in Italy", True), ("Lyon", False), ("Paris", True), ("", False)],
        "KN": [("", False), ("Rome", True), ("Oslo", False), ("Paris", True)],
    }
    assert [answer.text for answer in fact.before] == ["Paris"] * 4
    assert fact.shares == []


@pytest.mark.parametrize("text", ["Lyon", None])
def test_without_a_success_or_an_answer_there_is_no_fact(text):
    assert look_at({"PAC": predictions([text])}, "PAC", None) is None


@pytest.mark.parametrize(("group", "place"), [(1, 1), (2, 0)])
def test_impact_by_layer_is_of_the_group_of_the_fact(group, place, tmp_path):
    scores = np.ones((3, 2, 2, 1), np.float32)  # groups, layers, keys | values, paths
    scores[place, 1, 0, 0] = -5.0  # of eight in all, whatever its sign
    facts = {"case_ids": ["1", "2", "3"], "settings": {"group": group}}
    about = {"kmebench.paths.v2": json.dumps({"facts": facts})}
    save_file({"positive_scores": scores}, tmp_path / "paths.safetensors", about)
    fact = look_at({"PAC": PAC}, "PAC", tmp_path / "paths.safetensors")
    assert fact.shares == [[12.5, 12.5], [62.5, 12.5]]
