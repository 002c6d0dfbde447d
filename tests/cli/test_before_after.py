"""An edit as tables."""

import io

import pytest
from rich.console import Console

from kmebench.cli.before_after import Look, answers, next_tokens, summary, verdicts
from kmebench.cli.terminal import draw

BEFORE = Look([(" Paris", 0.5), (" the", 0.25)], ["Paris. It", "Berlin", "Lima"])
AFTER = Look([(" Rome", 1.0), (" Paris", 0.0)], ["Rome. It", "Berlin", "Rome"])


def text(shown):
    paper = Console(file=io.StringIO(), width=200, markup=False)
    paper.print(shown)
    return paper.file.getvalue().splitlines()


def test_what_is_written_stays_or_changes_is_said():
    found = verdicts("Rome", BEFORE.answers, AFTER.answers)
    assert found == ["written", "same", "changed"]
    assert verdicts("Oslo", BEFORE.answers, AFTER.answers)[0] == "not written"
    assert summary(found) == "The fact is written; 1 of 2 neighbours changed."
    assert "--neighbour" in summary(found[:1])


def test_what_follows_the_natural_stop_of_an_answer_does_not_count():
    before = ["Paris.", "Anguila. Anguila is a country", "Lima is big", "Oslo"]
    after = ["Rome. Rome is", "Anguila. Anguila is a tropical", "Lima is small", "the Oslo!"]
    assert verdicts("Rome", before, after) == ["written", "same", "changed", "same"]
    assert verdicts("Rom", before, after)[0] == "not written"


def test_a_row_holds_a_prompt_both_answers_and_the_verdict():
    rows = text(answers(["a", "b", "[/c]"], BEFORE, AFTER, ["written", "same", "changed"]))
    assert [line.split() for line in rows if "changed" in line] == [
        ["[/c]", "Lima", "Rome", "changed"]
    ]


def test_a_bar_is_as_long_as_its_probability():
    rows = text(next_tokens("a", "Rome", BEFORE, AFTER))
    first = next(line for line in rows if "Paris" in line)
    old, new = (part.count("█") for part in first.split("' Rome'"))
    assert new == 2 * old > 0
    assert "50.0%" in first
    assert "100.0%" in first


@pytest.mark.parametrize(("target", "count"), [("Rome", 3), ("Oslo", 0)])
def test_the_token_that_begins_the_target_stands_out(target, count):
    table = next_tokens("a", target, BEFORE, AFTER)
    styles = [str(cell.style) for column in table.columns for cell in column.cells]
    assert sum("green" in style for style in styles) == count


def test_a_picture_asks_no_server_and_holds_what_is_shown(tmp_path):
    draw(tmp_path / "edit.svg", [next_tokens("a", "Rome", BEFORE, AFTER)])
    svg = (tmp_path / "edit.svg").read_text(encoding="utf-8")
    assert "url(http" not in svg
    assert "Rome" in svg
