"""Files and folders that appear under their final name only when they are complete."""

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path``; it becomes ``path`` if the block succeeds.

    The hidden path is the block's own: of two processes that write ``path`` at once both succeed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _own_place(path)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        # safetensors makes private files; results are shared like any of the user's.
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, resume: str = "") -> Iterator[Path]:
    """Yield a hidden folder beside ``folder``; it becomes ``folder`` when the block succeeds.

    It is empty, the block's own, and goes when the block fails. With ``resume``, the name of a
    download, it holds what an earlier try of the same download has brought, so that gigabytes come
    but once. A folder that another process has brought meanwhile stays.
    """
    replaces = folder.is_dir()
    if resume:
        mark = hashlib.sha256(resume.encode()).hexdigest()[:12]
        staging = folder.parent / f".{folder.name}.{mark}.partial"
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = _own_place(folder)
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            if not path.is_symlink():  # what a link leads to is the user's
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors files are written 0600
        if replaces:
            with suppress(FileNotFoundError):  # another process was first
                shutil.rmtree(folder.rename(_own_place(folder)))
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        if not resume:
            shutil.rmtree(staging, ignore_errors=True)


#: Seconds after which what another machine has begun is taken for abandoned.
_ABANDONED = 86400
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_NUMBERS = itertools.count()
_OWNED = re.compile(r"\..+\.(?P<host>[0-9a-f]{6})-(?P<process>\d{1,9})-\d+\.partial")


def _own_place(path: Path) -> Path:
    """Return a hidden path beside ``path`` that is nobody else's; remove what killed ones left."""
    for left in path.parent.iterdir():
        owner = _OWNED.fullmatch(left.name)
        if owner and _is_abandoned(left, owner["host"], int(owner["process"])):
            with suppress(OSError):  # removed meanwhile, or another user's
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    # A name may take 255 letters, and is cut so that the mark has room.
    return path.with_name(f".{path.name[:200]}.{_HOST}-{os.getpid()}-{next(_NUMBERS)}.partial")


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    """Whether the process that made a hidden path is gone, or, on another machine, old."""
    try:
        if host != _HOST:
            return time.time() - path.stat().st_mtime > _ABANDONED
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (FileNotFoundError, PermissionError):  # finished meanwhile; another user's
        return False
    return False


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
