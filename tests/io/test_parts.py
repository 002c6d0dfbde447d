"""Parts of a file that takes hours."""

import pytest

from kmebench.io.parts import Parts


def written(parts, count, made, fails_at=None):
    def write(path, items):
        if items.start == fails_at:
            raise RuntimeError("power cut")
        made.append((items.start, items.stop))
        path.write_text(f"{items.start}:{items.stop}")

    return [file.read_text() for file in parts.files(count, 2, write, "things")]


def test_a_second_try_goes_on_behind_the_parts_of_the_first(tmp_path):
    made = []
    with pytest.raises(RuntimeError):
        written(Parts(tmp_path / "f", {"inputs": "a"}), 5, made, fails_at=4)
    assert written(Parts(tmp_path / "f", {"inputs": "a"}), 5, made) == ["0:2", "2:4", "4:6"]
    assert made == [(0, 2), (2, 4), (4, 6)]


def test_parts_of_another_identity_are_made_again(tmp_path):
    made = []
    written(Parts(tmp_path / "f", {"inputs": "a"}), 5, made)
    written(Parts(tmp_path / "f", {"inputs": "b"}), 2, made)
    assert made == [(0, 2), (2, 4), (4, 6), (0, 2)]
    assert sorted(p.name for p in (tmp_path / "f.partial").iterdir()) == ["0", "identity.json"]


def test_what_was_cut_off_while_it_was_written_is_no_part(tmp_path):
    written(Parts(tmp_path / "f", {}), 2, [])
    (tmp_path / "f.partial" / ".2.partial").write_text("2:")
    made = []
    written(Parts(tmp_path / "f", {}), 4, made)
    assert made == [(2, 4)]


def test_nothing_is_left_of_them_in_the_end(tmp_path):
    parts = Parts(tmp_path / "f", {})
    written(parts, 2, [])
    parts.clear()
    assert list(tmp_path.iterdir()) == []
