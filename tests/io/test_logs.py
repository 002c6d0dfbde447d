"""How a rule's script ends."""

import errno
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from kmebench.errors import DataError
from kmebench.io.logs import _left, announce, doing, script_log, track


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):  # script_log replaces them
        monkeypatch.setattr(f"sys.{name}", getattr(sys, name))
    return SimpleNamespace(log=[str(tmp_path / "log.txt")], rule="table", wildcards=["one"])


def ended(job, error):
    with pytest.raises(SystemExit, match="1"), script_log(job):
        raise error
    return Path(job.log[0]).read_text(encoding="utf-8")


def test_a_users_error_is_one_sentence(job):
    assert ended(job, DataError("There is no such file.")) == "table: There is no such file.\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_to_is_one_sentence(job, number):
    said = ended(job, OSError(number, "what the system says", "results/a.csv"))
    assert "results/a.csv" in said
    assert "nothing finished is lost" in said
    assert said.count("\n") == 1


def test_a_bug_keeps_its_traceback(job):
    with pytest.raises(OSError, match="else"), script_log(job):
        raise OSError(errno.EPIPE, "something else")


def test_a_full_disk_is_told_by_safetensors_in_its_text(job):
    said = ended(job, SafetensorError("Error while serializing: No space left (os error 28)"))
    assert "make room" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_being_done_is_told_on_a_terminal_alone(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with doing("loading [b] the model"):
        pass
    assert ("loading [b] the model" in stream.getvalue()) is terminal


def test_what_is_announced_stands_in_the_log_and_on_the_terminal(job, capsys):
    with script_log(job):
        announce("part 1 of 2")
    assert Path(job.log[0]).read_text(encoding="utf-8").endswith(" part 1 of 2\n")
    assert capsys.readouterr().err == "table one: part 1 of 2\n"


def test_without_a_log_file_it_is_told_once(job, capsys):
    job.log = []
    with script_log(job):
        announce("part 1 of 2")
    assert capsys.readouterr().err.count("part 1 of 2") == 1


def test_when_a_script_has_ended_nothing_goes_to_its_terminal(job, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with script_log(job):
        announce("while it runs")
    announce("afterwards")
    assert terminal.getvalue() == "table one: while it runs\n"


def test_a_long_job_says_in_its_log_how_much_is_left(monkeypatch, caplog):
    """Every tenth of the way, and never less often than every five minutes."""
    clock = {"now": 0.0}
    monkeypatch.setattr("kmebench.io.logs.time.monotonic", lambda: clock["now"])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="kmebench"):
        for i in track(range(40), "edits", 40):
            clock["now"] += 1 if i < 16 else 310
    said = [record.getMessage() for record in caplog.records]
    assert said[:4] == [f"edits: {done} of 40" for done in (4, 8, 12, 16)]
    assert said[4] == "edits: 17 of 40, 7 min left"  # 326 s for 17: 441 s for 23
    assert said[5] == "edits: 18 of 40, 13 min left"
    assert len(said) == 4 + 24
    assert said[-2:] == ["edits: 39 of 40, 3 min left", "edits: 40 of 40"]


def test_hours_are_left():
    assert [_left(s) for s in (59, 60, 3599, 5400)] == [
        "",
        ", 1 min left",
        ", 60 min left",
        ", 1.5 h left",
    ]
