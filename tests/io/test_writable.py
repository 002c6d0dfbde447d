"""Folders that files cannot be made in."""

import os
from pathlib import Path

import pytest

from kmebench.errors import ConfigError
from kmebench.io.writable import check_writable


def test_a_folder_that_can_be_made_is_taken_and_not_made(tmp_path):
    for folder in (tmp_path, tmp_path / "a/b"):
        check_writable("results", folder, folder)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_nobody_may_write_to_is_named_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    expected = f"results cannot be '{tmp_path}/a/b': you may not write to {tmp_path}; mend its"
    with pytest.raises(ConfigError, match=f"^{expected} permissions or name another place.$"):
        check_writable("results", tmp_path / "a/b", tmp_path / "a/b")


def test_below_a_file_there_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=f"'file/a': {tmp_path}/file is no folder"):
        check_writable("results", Path("file/a"), Path("file/a"))
