"""The numbers of README.md and docs/*.md are those of the reference results."""

import re
from pathlib import Path

import pandas as pd
import pytest

from kmebench.errors import KMEBenchError
from kmebench.reporting.quotes import filled, pages, quote, without_quotes

EDITORS = Path("reference/smollm2-135m-editors")
PAGES = [pytest.param(page.read_text(encoding="utf-8"), id=str(page)) for page in pages()]
README = Path("README.md").read_text(encoding="utf-8")
INTERVAL = re.compile(r"\[[+−-]?\d+(\.\d+)?, ?[+−-]?\d+(\.\d+)?\]")


def numbers(text):
    return [float(x) for x in re.findall(r"[+-]?\d+\.\d+", text.replace("−", "-"))]


@pytest.mark.parametrize("text", PAGES)
def test_quoted_numbers_are_those_of_the_reference_results(text):
    assert filled(text) == text, "python -m kmebench.reporting.quotes"


@pytest.mark.parametrize("text", PAGES)
def test_no_interval_stands_in_prose_without_its_source(text):
    prose = re.sub(r"```.*?```|`[^`]*`", "", without_quotes(text), flags=re.DOTALL)
    assert not INTERVAL.search(prose), INTERVAL.search(prose)


@pytest.mark.parametrize("text", PAGES)
def test_a_quote_inside_a_paragraph_never_begins_a_line(text):
    """Markdown would take the whole line for HTML."""
    assert not re.search(r"^<!--= .*-->.+", text, re.MULTILINE)


@pytest.mark.parametrize("metric", ["efficacy", "generality", "locality", "score"])
def test_a_quoted_mean_is_what_make_tables_prints(metric):
    """The tables are made from the metrics' files, quotes from the predictions."""
    for number in (1, 2):
        table = pd.read_csv(EDITORS / f"tables/table{number}.csv")
        for row in table[table["editor"] != "original"].to_dict("records"):
            run = f"{row['dataset']}/{row['mode']}/{row['editor']}"
            cell = [row[metric + end] for end in ("", "_low", "_high")]
            assert numbers(quote(f"editors {run} {metric}")) == pytest.approx(cell, abs=0.051), run
            assert quote(f"editors {run} n") == str(row["n"])


def test_a_quote_may_be_of_the_model_after_so_many_edits():
    """Against the table of the figure over edits."""
    names = {"PAC": "pac", "UltraEdit": "ultraedit"}
    drawn = pd.read_csv("reference/full-length/figures/collapse.csv")
    rows = drawn[(drawn["metric"] == "Score") & (drawn["source"] == "here")]
    assert {1, 100, 300} < set(rows["edits_done"])
    for row in rows[rows["edits_done"] < rows["edits_done"].max()].to_dict("records"):
        run = f"zsre-long/consecutive/{names[row['editor']]}"
        shown = numbers(quote(f"full-length/smollm2-135m {run} score@{row['edits_done']}"))
        cell = [row[end] for end in ("mean", "low", "high")]
        assert shown == pytest.approx(cell, abs=0.051), row


def test_what_is_forgotten_is_the_table_s_efficacy_minus_its_column_write():
    table = pd.read_csv(EDITORS / "tables/table2.csv")
    for row in table[table["editor"] != "original"].to_dict("records"):
        change = row["efficacy"] - row["write_efficacy"]
        shown = numbers(quote(f"editors {row['dataset']}/consecutive/{row['editor']} forgotten"))
        assert shown[0] == pytest.approx(change, abs=0.051), row["editor"]
        assert shown[1] <= shown[0] <= shown[2]


def test_a_quote_may_name_one_of_several_models():
    table = pd.read_csv("reference/sizes/tables/table2.csv").query("editor == 'pac'")
    for row in table.to_dict("records"):
        source = f"sizes/{row['model']} {row['dataset']}/{row['mode']}/pac score"
        cell = [row[f"score{end}"] for end in ("", "_low", "_high")]
        assert numbers(quote(source)) == pytest.approx(cell, abs=0.051), source
    assert len(set(table["model"])) == 2


def test_a_quoted_difference_is_what_make_tables_prints():
    found = pd.read_csv(EDITORS / "tables/findings.csv")["found"].astype(str)
    (printed,) = found[found.str.startswith("R-ROME − ROME")]
    shown = quote("editors zsre/consecutive/r-rome - zsre/consecutive/rome score")
    assert numbers(shown) == pytest.approx(numbers(printed), abs=0.051)


@pytest.mark.parametrize("source", ["scores", "editors zsre/batch/pac speed", "table reference"])
def test_a_quote_of_nothing_is_one_sentence(source):
    with pytest.raises(KMEBenchError, match=re.escape(repr(source))):
        filled(f"<!--= {source} -->1<!--/-->")


def test_the_readme_prints_the_metrics_that_it_quotes(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    exec(code, {})
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:-1])
    for kind, metric in (("edit", "efficacy"), ("paraphrase", "generality"), ("locality",) * 2):
        (mean, *_) = numbers(quote(f"editors zsre/consecutive/pac {metric}"))
        assert 100 * float(printed[kind]) == pytest.approx(mean, abs=0.051)


def test_what_the_readme_finds_in_words_holds():
    table = pd.read_csv(EDITORS / "tables/table2.csv").query("editor not in ['original', 'none']")
    for dataset, cells in table.groupby("dataset"):
        cells = cells.set_index("editor")
        assert cells["score"].idxmax() == "alphaedit"
        assert list(cells.index[cells["score_tied"]]) == ["memit", "prune", "rect"]
        run = f"{dataset}/consecutive"
        assert min(numbers(quote(f"editors {run}/alphaedit - {run}/pac score"))) > 0
        epochs = f"{dataset}/breadth_first/pac-released"
        assert min(numbers(quote(f"audit {epochs} - {run}/pac-released score"))) > 0
    floor = quote("editors counterfact/consecutive/pac - counterfact/consecutive/none score")
    assert numbers(floor)[1] < 0 < numbers(floor)[2]
