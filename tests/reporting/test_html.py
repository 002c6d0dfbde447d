"""Pages that people read."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from PIL import Image

from kmebench.reporting.costs import costs, costs_markdown
from kmebench.reporting.headlines import Headline
from kmebench.reporting.html import Summary, fragment, index, page, provenance_of
from kmebench.reporting.one_fact import Answer, Fact, Question
from kmebench.reporting.overview import panels

TABLE = """**A caption.**

| Editor | Score |
|---|---|
| PAC | **90.0** [80.0, 100.0] |
| KN | 9.5≈ |
"""
CHROMIUM = shutil.which("chromium")


def records(tmp_path, **timing):
    run = {
        "kmebench": "1",
        "git_commit": "abc",
        "settings": {"seed": 0},
        "requests": {"count": 30, "sha256": "e3b0"},
        "machine": "x86_64",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
    }
    spent = {
        "seconds_per_edit": 2.0,
        "median_seconds_per_edit": 1.5,
        "requests": 30,
        "failed_edits": 1,
        "model_load_seconds": 60.0,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "seconds": {"trace": 0.5, "optimise": 1.0, "solve": 0.25},
        "steps_per_call": 10.0,
        "peak_memory_bytes": {"process": 2**31},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "timing.json").write_text(json.dumps(spent | timing))
    return [tmp_path / "run.json"], [tmp_path / "timing.json"]


def cell(method="pac", **numbers):
    """One cell of the picture."""
    row = {"model": "m", "dataset": "d", "mode": "batch", "method": method, "control": False}
    row |= {"editor": method.upper(), "n": 30, "tied": True}
    for name in ("efficacy", "locality", "generality", "score"):
        value = numbers.get(name, 50.0)
        row |= {name: value, f"{name}_low": value - 5, f"{name}_high": value + 5}
    return row


def explored():
    """All numbers: two editors, two protocols."""
    columns = ["editor", "model", "dataset", "mode", "settings", "protocol", "when"]
    place = ["m", "d", "batch", "default"]
    shown = [
        [editor, *place, protocol, "after all edits", 30, [score + bonus, 10.0, 90.0]]
        for protocol, bonus in (("token", 0.0), ("wild", 5.0))
        for editor, score in (("KN", 9.5), ("PAC", 80.0), ("ROME", 60.0))
    ]
    return {
        "columns": [[name, name.capitalize()] for name in columns],
        "metrics": [["score", "Score", "mean (percent)", 1]],
        "rows": shown,
        "begin": dict(zip(columns, ["", *place, "token", "after all edits"], strict=True)),
    }


def summary(tmp_path, **changes):
    Image.new("RGB", (4, 2), "red").save(tmp_path / "figure3.png")
    fact = Fact(
        case_id="7",
        target="Rome",
        questions=(Question("Edit", "The capital of <France>?"),),
        before=(Answer("Paris", right=False),),
        after={"PAC": (Answer("Rome", right=True),)},
        shares=[[1.0, 2.0], [3.0, 94.0]],
    )
    claim = {"claim": "It holds.", "where": "Table 1", "paper": "1", "model": "m", "dataset": "d"}
    filled = {
        "title": "Summary",
        "panels": panels(pd.DataFrame([cell()]), {"PAC": "#123456"}),
        "headlines": [Headline("Who is best", ("PAC is.",))],
        "explorer": explored(),
        "tables": {"tables/table1": ("One", TABLE), "comparisons/audit": ("Pairs", TABLE)},
        "figures": {"figure3": ("Seconds & more", tmp_path / "figure3.png")},
        "findings": [claim | {"found": "+1", "edits": 30, "n": 30, "verdict": "holds"}],
        "costs": TABLE,
        "fact": fact,
        "place": "m, d",
        "notebooks": ["01_tour"],
        "provenance": provenance_of(*records(tmp_path)),
        "files": {"metrics/table1.parquet": "abc123"},
        "config": "seed: 0",
    }
    return Summary(**filled | changes)


EMPTY = {
    **{"panels": [], "headlines": [], "explorer": {}, "tables": {}, "figures": {}},
    **{"findings": [], "costs": "", "fact": None, "notebooks": [], "files": {}, "config": ""},
}


def test_markdown_becomes_a_table_and_its_marks_stay():
    html = fragment(TABLE)
    assert html.count("<tr>") == 3
    assert "<strong>90.0</strong> [80.0, 100.0]" in html


def test_texts_of_a_config_are_shown_not_obeyed():
    html = page("<script>alert(1)</script>", "| <img src=x onerror=alert(1)> |\n|---|\n| a |\n")
    assert "<script>alert" not in html
    assert "<img src=x" not in html


def test_every_table_figure_and_notebook_is_linked(tmp_path):
    html = index(summary(tmp_path))
    links = ("tables/table1.csv", "comparisons/audit.csv", "figures/figure3.pdf")
    for link in (*links, "notebooks/01_tour.html", "metrics/table1.parquet", "#provenance"):
        assert f'"{link}"' in html
    assert "Seconds &amp; more" in html


def test_a_verdict_keeps_its_colour_whatever_its_scale(tmp_path):
    row = summary(tmp_path).findings[0] | {"verdict": "does not hold at 50 edits"}
    html = index(summary(tmp_path, findings=[row]))
    assert '<td class="verdict does-not-hold">does not hold at 50 edits</td>' in html


def test_the_page_needs_nothing_beside_it(tmp_path):
    html = index(summary(tmp_path))
    assert "http" not in html  # nothing is fetched
    assert not re.findall(r'(?:src|<link[^>]* href)="(?!data:)', html)
    assert "data:image/png;base64," in html
    assert 'width="2" height="1"' in html  # half of 4 x 2


def test_what_a_folder_does_not_hold_is_left_out(tmp_path):
    whole, bare = index(summary(tmp_path)), index(summary(tmp_path, **EMPTY))
    sections = set(re.findall(r'<section id="(\w+)"', whole))
    assert {"overview", "headlines", "fact", "explore", "findings", "figures", "costs"} < sections
    assert re.findall(r'<section id="(\w+)"', bare) == ["provenance"]
    assert re.findall(r'<a[^>]* href="#(\w+)"', bare) == ["provenance"]


def test_texts_of_records_are_shown_not_obeyed(tmp_path):
    html = index(summary(tmp_path, config="</pre><script>alert(1)</script>"))
    assert "The capital of &lt;France&gt;?" in html
    assert "<script>alert" not in html
    assert "</script>" not in index(summary(tmp_path)).split('id="data">')[1].split("]]}")[0]


def test_provenance_sums_what_runs_took(tmp_path):
    runs, timings = records(tmp_path)
    found = provenance_of(runs * 2, timings * 2)
    assert (found["Runs"], found["Edits"], found["Edits that failed"]) == ("2", "60", "2")
    assert found["Time spent editing"] == "2.0 min"
    assert found["Commit"] == "abc"
    assert found["Requests (SHA-256)"] == "30: e3b0"


def test_costs_are_split_by_stage(tmp_path):
    _, (path,) = records(tmp_path, peak_memory_bytes={"process": 2**31, "cuda": 2**30})
    run = {"model": "m", "dataset": "d", "mode": "batch", "editor": "PAC"}
    row = costs([path], [run]).iloc[0]
    assert row["trace_seconds"] == 0.5
    assert row["apply_seconds"] == 0.0
    assert row["other_seconds"] == pytest.approx(0.25)
    assert row["peak_gib"] == 1.0  # the GPU's
    assert "| PAC    | 30    | 2.00   | 1.50" in costs_markdown(costs([path], [run]))


def test_costs_show_what_edits_leave_where_it_was_measured(tmp_path):
    """Bytes are those at the end; a run of version 0.2 has none, and edits of weights no gate."""
    kinds = {"edit": 1.0, "locality": 0.125}
    left = [{"edits_done": n, "change": n * 2**20, "state": 0} for n in (1, 30)]
    asked = {"question_milliseconds": {"before": 2.0, "after": 31.5}, "bytes": left}
    files = []
    for name, timing in {"old": {}, "new": asked | {"gate": kinds}, "weights": asked}.items():
        (tmp_path / name).mkdir()
        files += records(tmp_path / name, **timing)[1]
    runs = [
        {"model": "m", "dataset": "d", "mode": "batch", "editor": editor}
        for editor in ("PAC", "GRACE", "MEMIT")
    ]
    table = costs(files, runs)
    assert table["change_bytes"].tolist() == [pd.NA, 30 * 2**20, 30 * 2**20]
    assert table["gate_locality"].dropna().tolist() == [0.125]
    taken, left = costs_markdown(table).split("**What edits leave")
    assert "PAC" in taken
    assert "PAC" not in left
    assert "| GRACE  | 30    | 2.00                | 31.50 | 30.00        | 0.00        " in left
    assert "| 100.00         | –                    | 12.50              | – " in left
    assert left.count("| –              | –                    | –") == 1
    assert "What edits leave" not in costs_markdown(table[:1])


def opened(path, address="", script=""):
    """The page as a browser has it after ``script``; fails on any message of its console."""
    html = path.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    tried = path.with_name("tried.html")
    tried.write_text(html, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--dump-dom"]
    command += [tried.as_uri() + address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors
    return done.stdout


def numbers_of(dom):
    """Editors and first numbers of the page's own table, in order, and its head."""
    table = dom.split('id="numbers"')[1].split("</table>")[0]
    rows = re.findall(r'<th scope="row">(\w+)</th>.*?data-value="([\d.]+)"', table)
    return [(editor, float(value)) for editor, value in rows], table.split("</thead>")[0]


in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; the gate installs it"
)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "index.html"
    path.write_text(index(summary(tmp_path)), encoding="utf-8")
    return path


@in_a_browser
def test_a_browser_sorts_the_papers_tables_greatest_first(written):
    dom = opened(written, script="document.querySelectorAll('#tables-table1 th button')[1].click()")
    table = dom.split('id="tables-table1"')[1].split("</table>")[0]
    assert table.index("PAC") < table.index("KN")
    assert 'aria-sort="descending"' in table


@in_a_browser
def test_the_address_says_what_the_table_of_all_numbers_shows(written):
    rows, _ = numbers_of(opened(written))
    assert rows == [("KN", 9.5), ("PAC", 80.0), ("ROME", 60.0)]  # token, as the config has them
    rows, head = numbers_of(opened(written, "#protocol=wild&metric=score&sort=-score"))
    assert rows == [("PAC", 85.0), ("ROME", 65.0), ("KN", 14.5)]
    assert 'aria-sort="descending"' in head


@in_a_browser
def test_filter_and_sort_are_kept_in_the_address(written):
    script = """
        const select = document.querySelector("select[name=protocol]");
        select.value = "wild";
        select.dispatchEvent(new Event("change"));
        document.querySelector("#numbers th button").click();
        document.title = location.hash;
    """
    dom = opened(written, script=script)
    rows, head = numbers_of(dom)
    assert [editor for editor, _ in rows] == ["KN", "PAC", "ROME"]
    assert 'aria-sort="ascending"' in head
    assert "<title>#sort=editor&amp;protocol=wild</title>" in dom


@in_a_browser
def test_a_mark_says_its_numbers_and_stands_out(written):
    dom = opened(written, script="document.querySelector('.mark').focus()")
    assert 'class="mark chosen"' in dom
    tip = dom.split('id="tip"')[1].split("</div>")[0]
    assert "Efficacy 50.0 [45.0, 55.0]" in tip
    assert "30 edits" in tip
