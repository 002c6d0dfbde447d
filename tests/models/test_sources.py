"""Model sources."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from kmebench.errors import ModelError
from kmebench.io import files
from kmebench.io.files import sha256_of
from kmebench.models import sources
from kmebench.models.editable import EditableModel
from kmebench.models.sources import fetch_model, save_model
from tests.gguf_files import write_gguf


@pytest.fixture
def folder(trained, tmp_path):
    save_model(trained.model, trained.tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_can_be_read_by_everyone(folder):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_a_local_folder_is_taken_by_reference_and_never_changed(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").chmod(0o600)
    (folder / "config.json").chmod(0o440)
    (folder / ".snakemake_timestamp").touch()
    before = {path.name: path.stat() for path in folder.iterdir()}

    def owned_by_another(path, *_, **__):
        if Path(path).resolve().parent == folder:
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", owned_by_another)
    monkeypatch.setattr(os, "utime", owned_by_another)
    fetch_model({"source": "folder", "path": str(folder)}, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_symlink()
    assert not (tmp_path / "copy" / ".snakemake_timestamp").exists()
    assert EditableModel.load(tmp_path / "copy").n_layers == 4
    after = {path.name: path.stat() for path in folder.iterdir()}
    for name, state in after.items():
        assert (state.st_mode, state.st_mtime_ns) == (
            before[name].st_mode,
            before[name].st_mtime_ns,
        )


def test_what_a_killed_link_stage_left_is_never_written_through(
    folder, trained, tmp_path, monkeypatch
):
    """The config then names another source, whose files must not land in the user's folder."""
    # In a container the next process may have the number of the one that was killed.
    monkeypatch.setattr(files, "_NUMBERS", itertools.count())
    left = tmp_path / f".made.{files._HOST}-{os.getpid()}-0.partial"
    left.mkdir()
    for path in folder.iterdir():
        (left / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trained.model.config.bos_token_id, kept = 1, trained.model.config.bos_token_id
    try:
        save_model(trained.model, trained.tokenizer, tmp_path / "made")
    finally:
        trained.model.config.bos_token_id = kept
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())


def test_a_relative_path_gives_links_that_move_with_the_checkout(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    fetch_model({"source": "folder", "path": "model"}, Path("results/models/mine"))
    for name in ("model", "results"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert EditableModel.load(tmp_path / "moved/results/models/mine").n_layers == 4


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "is no Hugging Face folder with config.json and safetensors weights"),
        (["config.json"], "is no Hugging Face folder with config.json and safetensors weights"),
        (["model.safetensors"], "is no Hugging Face folder with config.json"),
        (["config.json", "model.safetensors", "adapter_config.json"], "holds a PEFT adapter"),
    ],
)
def test_a_folder_that_holds_no_whole_model_is_refused(files, complaint, tmp_path):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ModelError, match=complaint):
        fetch_model({"source": "folder", "path": str(tmp_path)}, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_may_not_be_read_is_one_sentence(folder, tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.origins, "model_files", refuse)
    with pytest.raises(ModelError, match=r"model cannot be read .Permission denied."):
        fetch_model({"source": "folder", "path": str(folder)}, tmp_path / "copy")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"path": "none.gguf"}, r"There is no GGUF file .*none\.gguf"),
        ({"path": "small.gguf", "sha256": "0" * 64}, "small.gguf has the sha256 .* another file"),
    ],
)
def test_a_gguf_file_is_the_named_one(given, complaint, tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    source = {"source": "gguf"} | given | {"path": str(tmp_path / given["path"])}
    with pytest.raises(ModelError, match=complaint):
        fetch_model(source, tmp_path / "model")


def test_a_local_gguf_file_is_taken(make_model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "small.gguf", make_model("llama", torch.float32).model, tokenizer)
    source = {"source": "gguf", "path": str(path), "sha256": sha256_of(path)}
    fetch_model(source, tmp_path / "model")
    assert EditableModel.load(tmp_path / "model").n_layers == 3


def test_terms_of_use_are_named(folder, tmp_path, caplog):
    terms = "https://maker.org/terms"
    with caplog.at_level("INFO", "kmebench"):
        fetch_model({"source": "folder", "path": str(folder), "terms": terms}, tmp_path / "copy")
    assert f"accepts its terms: {terms}" in caplog.text


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources, "snapshot_download", offline)
    with pytest.raises(ModelError, match="owner/name at revision abc could not be downloaded"):
        fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")


def test_a_hub_revision_without_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, local_dir, **__: str(local_dir))
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")


def test_the_hub_is_asked_for_the_pinned_revision_and_no_pickle(tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, revision, local_dir, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        (local_dir / "model.safetensors").write_bytes(b"")
        return str(local_dir)

    monkeypatch.setattr(sources, "snapshot_download", download)
    fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")
    assert asked["revision"] == "abc"
    assert not any("bin" in pattern or pattern[-2:] == "pt" for pattern in asked["patterns"])
