"""Tables in the paper's layout."""

from dataclasses import replace

import pandas as pd
import pytest

from kmebench.errors import KMEBenchError
from kmebench.reporting.paper import read_paper_table
from kmebench.reporting.tables import Layout, escape_latex, to_latex, to_markdown, wide_table

PAPER = read_paper_table("resources/paper/table2.csv")


def named(label, paper_name=None):
    return {"label": label, "paper_name": paper_name}


LAYOUT = Layout(
    title="Consecutive editing",
    protocol="token",
    mode="consecutive",
    models={"gpt-j": named("GPT-J & co", "GPT-J (6B)"), "small": named("Small")},
    datasets={"zsre": named("ZsRE", "ZsRE"), "own": named("Own_facts")},
    methods={"full-c": named("Full-C", "Full-C"), "pac": named("PAC", "Ours")},
)


def metric(method, name, value, *, model="gpt-j", dataset="zsre", when="final", **other):
    row = {
        "experiment": "table2",
        "model": model,
        "dataset": dataset,
        "mode": "consecutive",
        "method": method,
        "variant": "default",
        "seed": 0,
        "protocol": "token",
        "when": when,
        "edits_done": 20,
        "metric": name,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n": 20,
        "seconds_per_edit": 1.25,
        "failed_edits": 0,
        "behind_p": float("nan"),
    }
    return row | other


METRICS = pd.DataFrame(
    [
        metric("original", "efficacy", 0.2, seconds_per_edit=float("nan")),
        metric("pac", "efficacy", 0.9),
        metric("pac", "locality", 0.4),
        metric("pac", "generality", 0.5),
        metric("pac", "score", 0.6),
        metric("pac", "efficacy", 1.0, when="write"),
        metric("full-c", "efficacy", 0.3),
        metric("pac", "efficacy", 0.1, protocol="wild"),
    ]
)
TABLE = wide_table(METRICS, PAPER, LAYOUT)


def cell(editor, dataset="zsre", model="gpt-j"):
    rows = TABLE[(TABLE[["model", "editor", "dataset"]] == [model, editor, dataset]).all(axis=1)]
    return rows.iloc[0]


def test_the_papers_number_and_the_difference_stand_beside_ours():
    pac = cell("pac")
    assert pac["efficacy"] == pytest.approx(90)
    assert (pac["efficacy_low"], pac["efficacy_high"]) == pytest.approx((80, 100))
    assert pac["efficacy_paper"] == 88.74
    assert pac["efficacy_difference"] == pytest.approx(1.26)
    assert pac["write_efficacy"] == pytest.approx(100)
    assert cell("original")["efficacy_paper"] == 21.65


def test_where_the_paper_has_no_number_none_is_invented():
    assert pd.isna(cell("pac", "own")["efficacy_paper"])
    assert pd.isna(cell("pac", model="small")["efficacy_paper"])


def test_a_missing_run_is_a_dash_never_a_zero():
    assert pd.isna(cell("full-c")["locality"])
    markdown = to_markdown(TABLE, LAYOUT)
    (line,) = [x for x in markdown.splitlines() if x.startswith("| Small") and "PAC" in x][:1]
    assert line.count("–") == 6
    assert "0.0" not in line


def test_every_editor_has_its_row_the_unedited_model_first():
    zsre = TABLE[TABLE["dataset"] == "zsre"]
    assert zsre["editor"].tolist() == ["original", "full-c", "pac"] * 2


def test_markdown_shows_interval_paper_best_and_write():
    markdown = to_markdown(TABLE, LAYOUT)
    assert "**90.0** [80.0, 100.0] (paper 88.74)" in markdown
    assert "protocol token, 20 edits per cell" in markdown
    assert "| 100.0 | 1.25   |" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:8]}) == 1  # aligned


def test_what_cannot_be_told_from_the_best_is_marked():
    assert "≈" not in to_markdown(TABLE, LAYOUT)
    near = metric("full-c", "score", 0.5, behind_p=0.05)
    far = metric("full-c", "locality", 0.1, behind_p=0.049)
    table = wide_table(pd.concat([METRICS, pd.DataFrame([near, far])]), PAPER, LAYOUT)
    markdown = to_markdown(table, LAYOUT)
    assert "50.0≈ [40.0, 60.0]" in markdown
    assert "10.0 [0.0, 20.0]" in markdown
    assert markdown.count("≈") == 2  # the caption explains it
    assert "≈: not distinguishable from it (paired bootstrap, Holm over the editors of" in markdown
    assert r"$50.0^{\approx}_{[40.0,\,60.0]}$" in to_latex(table, LAYOUT)


@pytest.mark.parametrize(("n", "marks"), [(19, 0), (20, 1)])
def test_too_few_edits_have_no_best(n, marks):
    near = metric("full-c", "score", 0.5, behind_p=0.05)
    metrics = pd.concat([METRICS, pd.DataFrame([near])]).assign(n=n)
    table = wide_table(metrics, PAPER, LAYOUT)
    body = to_markdown(table, LAYOUT).split("\n\n", 1)[1]
    assert ("**90.0**" in body) == marks
    assert body.count("≈") == marks
    assert to_latex(table, LAYOUT).count(r"\mathbf{90.0}") == marks
    assert ("no best is marked among fewer than 20 edits" in to_markdown(table, LAYOUT)) != marks


def test_the_floor_is_a_row_but_never_the_best():
    floor = Layout(
        **(LAYOUT.__dict__ | {"methods": LAYOUT.methods | {"none": named("No edit")}}),
    )
    rows = [
        metric("none", "locality", 1.0),
        metric("full-c", "locality", 0.3, behind_p=0.01),
    ]
    metrics = pd.concat([METRICS, pd.DataFrame(rows)])
    for controls, best in (((), "100.0"), (["none"], "40.0")):
        layout = Layout(**(floor.__dict__ | {"controls": controls}))
        table = wide_table(metrics, PAPER, layout)
        text = to_markdown(table, layout)
        (line,) = (x for x in text.splitlines() if "No edit" in x and "GPT-J" in x and "100" in x)
        assert ("**100.0**" in line) == (best == "100.0")
        assert "≈" not in text
        assert f"**{best}** [" in text
        assert rf"\mathbf{{{best}}}" in to_latex(table, layout)


def state(method, name, value, **other):
    nan = float("nan")
    unknown = dict.fromkeys(("low", "high", "behind_p"), nan)
    return metric(method, name, value, protocol="health", **unknown | {"n": 900} | other)


def test_health_stands_in_columns_of_its_own_where_it_was_measured():
    rows = [
        state("pac", "perplexity_ratio", 1.234),
        state("pac", "perplexity_ratio", 9.0, when="milestone"),
        state("pac", "kl", 0.5),
        state("pac", "perplexity", 17.0),
    ]
    table = wide_table(pd.concat([METRICS, pd.DataFrame(rows)]), PAPER, LAYOUT)
    markdown, latex = to_markdown(table, LAYOUT), to_latex(table, LAYOUT)
    assert "Perplexity × ↓ | KL ↓" in markdown
    (line,) = [x for x in markdown.splitlines() if "PAC" in x and "**90.0**" in x]
    assert [x.strip() for x in line.split("|")[-5:-1]] == ["100.0", "1.23", "0.500", "1.25"]
    (full_c,) = [x for x in markdown.splitlines() if "Full-C" in x and "30.0" in x]
    assert [x.strip() for x in full_c.split("|")[-4:-1]] == ["–", "–", "1.25"]
    assert "Perplexity ×: token perplexity on neutral text over the unedited model's" in markdown
    assert "20 edits per cell" in markdown  # tokens are no edits
    assert r"Perplexity $\times$ $\downarrow$ & KL $\downarrow$" in latex
    assert "$1.23$ & $0.500$" in latex
    body = [x for x in latex.splitlines() if "PAC" in x]
    assert all(x.count("&") - x.count(r"\&") == 1 + 12 for x in body)
    assert "Perplexity" not in to_markdown(TABLE, LAYOUT) + to_latex(TABLE, LAYOUT)
    assert not {"perplexity_ratio", "kl"} & set(TABLE)


def test_long_runs_say_when_half_of_the_best_score_was_lost():
    # A first edit may be right by luck.
    scores = {1: 1.0, 10: 0.1, 19: 1.0, 30: 0.8, 100: 0.41, 300: 0.39, 1000: 0.45}
    when = dict.fromkeys(scores, "milestone") | {1000: "final"}
    rows = [
        metric(method, "score", value, when=when[n], edits_done=n, n=300)
        for method, values in {"pac": scores, "full-c": scores | {300: 0.4}}.items()
        for n, value in values.items()
    ]
    table = wide_table(pd.DataFrame(rows), None, LAYOUT)
    half = table.set_index(["model", "editor", "dataset"])["half_after"]
    assert half["gpt-j", "pac", "zsre"] == 300
    assert pd.isna(half["gpt-j", "full-c", "zsre"])  # half is not below half
    markdown = to_markdown(table, LAYOUT)
    assert "Half at: edits after which Score was below half of its best from 20 on" in markdown
    (line,) = [x for x in markdown.splitlines() if "PAC" in x and "45.0" in x]
    assert [x.strip() for x in line.split("|")[-3:-1]] == ["300", "1.25"]
    assert "half_after" not in TABLE
    batch = wide_table(pd.DataFrame(rows).assign(mode="batch"), None, replace(LAYOUT, mode="batch"))
    assert "half_after" not in batch  # its edits are made at once


def test_failed_edits_are_counted_in_the_caption():
    assert "failed" not in to_markdown(TABLE, LAYOUT)
    failed = METRICS.assign(failed_edits=(METRICS["method"] == "pac") * 3)
    table = wide_table(failed, PAPER, LAYOUT)
    for text in (to_markdown(table, LAYOUT), to_latex(table, LAYOUT)):
        assert "Edits that failed: GPT-J " in text
        assert "PAC, ZsRE: 3." in text


def test_a_score_without_locality_is_said_in_the_caption():
    said = "Original model: Score without Locality"
    assert said not in to_markdown(TABLE, LAYOUT)
    scored = pd.concat([METRICS, pd.DataFrame([metric("original", "score", 0.2)])])
    assert said in to_markdown(wide_table(scored, PAPER, LAYOUT), LAYOUT)


def test_the_variants_of_a_sweep_are_rows_without_the_papers_number():
    swept = [metric("pac", "efficacy", 0.1, variant=f"paths={n}") for n in (20, 5)]
    table = wide_table(pd.concat([METRICS, pd.DataFrame(swept)]), PAPER, LAYOUT)
    rows = table[(table[["model", "editor", "dataset"]] == ["gpt-j", "pac", "zsre"]).all(axis=1)]
    assert rows["variant"].tolist() == ["default", "paths=20", "paths=5"]
    assert rows["efficacy"].tolist() == pytest.approx([90, 10, 10])
    assert rows["efficacy_paper"].notna().tolist() == [True, False, False]
    for text in (to_markdown(table, LAYOUT), to_latex(table, LAYOUT).replace(r"\_", "_")):
        assert "PAC, paths=20" in text
        assert "Full-C, default" not in text


def test_latex_is_escaped_and_balanced():
    latex = to_latex(TABLE, LAYOUT)
    assert r"GPT-J \& co" in latex
    assert r"Own\_facts" in latex
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    body = [line for line in latex.splitlines() if "PAC" in line]
    assert all(line.count("&") - line.count(r"\&") == 1 + 8 for line in body)
    assert r"$\mathbf{90.0}_{[80.0,\,100.0]}$ (88.74)" in latex


def test_latex_specials_are_printable():
    assert escape_latex("a_b%{}~^\\") == (
        r"a\_b\%\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_a_protocol_without_metrics_is_refused():
    with pytest.raises(KMEBenchError, match="no metrics of protocol 'exact'"):
        wide_table(METRICS, PAPER, Layout(**(LAYOUT.__dict__ | {"protocol": "exact"})))


def test_the_caption_names_the_size_of_turns():
    metrics = METRICS.assign(mode="consecutive+turn=50")
    layout = replace(LAYOUT, mode="consecutive+turn=50")
    text = to_markdown(wide_table(metrics, None, layout), layout)
    assert "Pipeline consecutive in turns of 50, protocol token" in text
    assert "Write: efficacy right after each turn" in text
    assert "| Write |" in text
    single = to_markdown(wide_table(METRICS, None, LAYOUT), LAYOUT)
    assert "Pipeline consecutive, protocol token" in single
    assert "right after each edit" in single
