"""Files and folders that appear when they are complete."""

import pytest

from kmebench.io.files import staged


@pytest.mark.parametrize("resume", ["", "owner/name at revision abc"])
def test_a_folder_appears_only_when_complete_and_a_download_keeps_what_arrived(resume, tmp_path):
    def download():
        with staged(tmp_path / "model", resume) as staging:
            (staging / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        download()
    assert not (tmp_path / "model").exists()
    with staged(tmp_path / "model", "another download") as staging:
        assert not (staging / "half").exists()
    with staged(tmp_path / "model", resume) as staging:
        assert (staging / "half").exists() == bool(resume)
        (staging / "rest").write_text("y")
    assert (tmp_path / "model" / "rest").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
