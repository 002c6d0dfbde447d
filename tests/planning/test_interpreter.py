"""Snakemake does not quote the path of Python: what a shell would not take is refused."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmebench.errors import ConfigError
from kmebench.planning.interpreter import check_interpreter
from tests.workflow.conftest import ROOT


@pytest.mark.parametrize("path", ["/my project/.venv/bin/python", "/a&b/python", "/it's/python"])
def test_a_path_that_a_shell_would_split_is_refused(path):
    with pytest.raises(ConfigError, match=r"The path of Python, .* Move this folder"):
        check_interpreter(path)


def test_this_interpreter_is_taken():
    check_interpreter(sys.executable)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_what_passes_is_one_word_to_a_shell(name):
    path = f"/x/{name}"
    try:
        check_interpreter(path)
    except ConfigError:
        return
    assert shlex.split(path) == [path]


def test_make_says_so_before_it_makes_an_environment(tmp_path):
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    done = subprocess.run(["make", "-n"], cwd=folder, capture_output=True, text=True)
    assert done.returncode
    assert "holds a blank" in done.stderr
    assert "pip" not in done.stdout


def test_snakemake_says_so_before_any_job(tmp_path):
    """An environment in a folder with a blank: links to this one's."""
    here = Path(sys.prefix)
    environment = tmp_path / "my project"
    (environment / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib", "bin/python"):
        (environment / name).symlink_to(here / name)
    done = subprocess.run(
        [environment / "bin/python", "-m", "snakemake", "-n", "--configfile", "config/ci.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert (
        f"The path of Python, {environment}/bin/python, holds a blank" in done.stdout + done.stderr
    )
