"""Pages that people read."""

import json
import shutil
import subprocess

import pytest

from kmebench.reporting.costs import costs, costs_markdown
from kmebench.reporting.html import fragment, index, page, provenance_of

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


def summary(tmp_path, tables=None):
    return index(
        "Summary",
        TABLE,
        tables or {"tables/table1": TABLE, "comparisons/audit": TABLE},
        {"figure3": "Seconds & more"},
        ["01_tour"],
        provenance_of(*records(tmp_path)),
    )


def test_markdown_becomes_a_table_and_its_marks_stay():
    html = fragment(TABLE)
    assert html.count("<tr>") == 3
    assert "<strong>90.0</strong> [80.0, 100.0]" in html


def test_texts_of_a_config_are_shown_not_obeyed():
    html = page("<script>alert(1)</script>", "| <img src=x onerror=alert(1)> |\n|---|\n| a |\n")
    assert "<script>alert" not in html
    assert "<img src=x" not in html


def test_every_table_figure_and_notebook_is_linked(tmp_path):
    html = summary(tmp_path)
    links = ("tables/table1.csv", "comparisons/audit.csv", "figures/figure3.pdf")
    for link in (*links, "figures/figure3.png", "notebooks/01_tour.html", "#provenance"):
        assert f'"{link}"' in html
    assert "Seconds &amp; more" in html
    assert "http" not in html  # nothing is fetched


def test_provenance_sums_what_runs_took(tmp_path):
    runs, timings = records(tmp_path)
    found = provenance_of(runs * 2, timings * 2)
    assert (found["Runs"], found["Edits"], found["Edits that failed"]) == ("2", "60", "2")
    assert found["Time spent editing"] == "2.0 min"
    assert found["Commit"] == "abc"


def test_costs_are_split_by_stage(tmp_path):
    _, (path,) = records(tmp_path, peak_memory_bytes={"process": 2**31, "cuda": 2**30})
    run = {"model": "m", "dataset": "d", "mode": "batch", "editor": "PAC"}
    row = costs([path], [run]).iloc[0]
    assert row["trace_seconds"] == 0.5
    assert row["apply_seconds"] == 0.0
    assert row["other_seconds"] == pytest.approx(0.25)
    assert row["peak_gib"] == 1.0  # the GPU's
    assert "| PAC    | 30    | 2.00   | 1.50" in costs_markdown(costs([path], [run]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; the gate installs it")
def test_a_browser_opens_the_page_and_sorts_its_tables(tmp_path):
    html = summary(tmp_path).replace(
        "</body>", "<script>document.querySelectorAll('#table1 th')[1].click()</script></body>"
    )
    path = tmp_path / "index.html"
    path.write_text(html, encoding="utf-8")
    for name in ("figures", "notebooks"):
        (tmp_path / name).mkdir()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors
    table = done.stdout.split('id="table1"')[1].split("</table>")[0]
    assert table.index("KN") < table.index("PAC")
    assert 'aria-sort="ascending"' in table
