"""Snakemake as a command."""

from pathlib import Path

import pytest

from kmebench.errors import ModelError
from kmebench.planning import workflow


def test_what_scripts_announce_is_shown_and_why_they_fail_is_told(tmp_path, monkeypatch, capfd):
    """A workflow of one rule, whose script ends as those of the rules do."""
    monkeypatch.chdir(tmp_path)
    announced = "fetch_model gemma3-270m: downloading part 1 of 2"
    said = f"{announced}\nfetch_model: It is not there."
    Path("fail.py").write_text(f"import sys; sys.exit({said!r})")
    rule = "rule fetch_model:\n    output: 'model'\n    shell: 'python fail.py'\n"
    Path("Snakefile").write_text(rule)
    with pytest.raises(ModelError, match=r"model could not be made: fetch_model: It is not there"):
        workflow.make(Path("model"), [])
    assert capfd.readouterr().err == f"{announced}\n"
