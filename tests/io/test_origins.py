"""What lies outside the workflow: which files are a model's, and when content has changed."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmebench.io import origins


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer_config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("vocab.json", True),
        ("merges.txt", True),
        (".snakemake_timestamp", False),
        ("._config.json", False),
        ("pytorch_model.bin", False),
        ("training_args.bin", False),
        ("modeling_mine.py", False),
        ("adapter_config.json", False),
        ("trainer_state.json", False),
        ("README.md", False),
    ],
)
def test_the_files_of_a_model(name, belongs, tmp_path):
    (tmp_path / name).write_text("x")
    (tmp_path / "folder.json").mkdir()
    assert origins.model_files(tmp_path) == ([tmp_path / name] if belongs else [])


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


def test_a_model_is_known_by_the_content_of_its_files_alone(model, tmp_path):
    before = origins.digest(model)
    for path in model.iterdir():
        path.touch()
    (model / ".snakemake_timestamp").touch()
    (model / "README.md").write_text("mine")
    (tmp_path / "elsewhere").symlink_to(model)
    assert origins.digest(tmp_path / "elsewhere") == before
    (model / "generation_config.json").write_text("{}")
    with_another = origins.digest(model)
    (model / "model.safetensors").write_text("retrained....")
    assert len({before, with_another, origins.digest(model)}) == 3


def test_large_weights_are_known_by_size_and_time(model, monkeypatch):
    monkeypatch.setattr(origins, "_READ", 12)
    weights = model / "model.safetensors"
    before = origins.digest(model)
    copied = weights.stat()
    weights.write_text("x" * copied.st_size)
    os.utime(weights, ns=(copied.st_atime_ns, copied.st_mtime_ns))
    assert origins.digest(model) == before  # nothing was read
    os.utime(weights, ns=(copied.st_atime_ns, copied.st_mtime_ns + 1))
    later = origins.digest(model)
    weights.write_text("x" * (copied.st_size + 1))
    os.utime(weights, ns=(copied.st_atime_ns, copied.st_mtime_ns + 1))
    assert len({before, later, origins.digest(model)}) == 3


URL = "from the URL"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", URL]), st.booleans()), max_size=12))
def test_a_rule_runs_again_if_and_only_if_other_content_is_found(tmp_path_factory, events):
    """Events: what lies in the mirror folder, and whether other reasons make the rule run.

    ``told`` is what Snakemake compares; ``holds`` is what the result was made of.
    """
    folder = tmp_path_factory.mktemp("events")
    file, note = folder / "file", folder / "note.json"
    download = folder / "download"
    download.write_text(URL)
    told = origins.parameter(None, note)
    origins.write_note(note, told, origins.digest(download))
    holds = URL
    for found, forced in events:
        if found is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(found)
        now = origins.parameter(file, note)
        assert (now != told) == (found not in (None, holds))
        if now != told or forced:
            told, holds = now, found or URL
            origins.write_note(note, told, origins.digest(file if found else download))
        assert origins.parameter(file, note) == told


@pytest.mark.parametrize("damaged", ["", "[]", "null", "{}", '{"parameter": "x"}', "\xff"])
def test_a_damaged_note_says_nothing(damaged, tmp_path):
    (tmp_path / "note").write_text(damaged, encoding="latin-1")
    assert origins.parameter(None, tmp_path / "note") is None
    assert origins.parameter(tmp_path / "note", tmp_path / "note") is not None


def test_what_may_not_be_read_counts_as_gone(model, tmp_path, monkeypatch):
    origins.write_note(tmp_path / "note", "told", "digest")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(origins, "sha256_of", refuse)
    assert origins.parameter(model, tmp_path / "note") == "told"
    assert origins.parameter(tmp_path / "nowhere", tmp_path / "note") == "told"


def test_a_note_that_cannot_be_read_is_not_taken_for_missing(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    origins.write_note(tmp_path / "note", "told", "taken")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OSError, match="Stale"):
        origins.parameter(None, tmp_path / "note")
