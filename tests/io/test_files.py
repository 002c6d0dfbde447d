"""Files and folders that appear when they are complete."""

import os
import subprocess
import sys
import time

import pytest

from kmebench.io.files import atomic_path, staged


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


#: Writes a file or a folder, and waits for a line before it ends.
WRITER = """
import sys
from pathlib import Path
from kmebench.io.files import atomic_path, staged
place, text = Path(sys.argv[1]), sys.argv[2]
with (staged if place.name == "folder" else atomic_path)(place) as temporary:
    (temporary / "part" if place.name == "folder" else temporary).write_text(text)
    print("written", flush=True)
    sys.stdin.readline()
"""


def writer(place, text):
    """Start a process that has written ``text`` and not finished."""
    command = [sys.executable, "-c", WRITER, str(place), text]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "written\n"
    return started


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["file", "folder"])
def test_two_processes_that_write_the_same_at_once_both_succeed(name, before, tmp_path):
    place = tmp_path / name
    part = place / "part" if name == "folder" else place
    if before:
        part.parent.mkdir(exist_ok=True)
        part.write_text("before")
    writers = [writer(place, text) for text in ("one", "other")]
    for each in writers:
        each.communicate("\n")
        assert each.returncode == 0
        assert part.read_text() in ("one", "other")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write_and_no_other(name, tmp_path):
    killed, alive = writer(tmp_path / name, "x"), writer(tmp_path / name, "y")
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_path(tmp_path / "next") as temporary:
        temporary.write_text("z")
    (left,) = set(tmp_path.iterdir()) - {tmp_path / "next"}
    assert f"-{alive.pid}-" in left.name
    alive.communicate("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "next"])


def test_what_another_machine_has_begun_stays_for_a_day(tmp_path):
    began = tmp_path / ".file.aaaaaa-1-0.partial"
    for hours, stays in ((23, True), (25, False)):
        began.write_text("half")
        os.utime(began, (time.time() - hours * 3600,) * 2)
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("whole")
        assert began.exists() == stays


def test_the_longest_name_can_be_written(tmp_path):
    for name in ("n" * 255, "m" * 254 + "1"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text(name)
        assert (tmp_path / name).read_text() == name
