"""Files and folders that appear under their final name only when they are complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path``; it becomes ``path`` if the block succeeds.

    Its name is always the same, so what a killed process leaves is replaced by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
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

    It is empty, and goes when the block fails. With ``resume``, the name of a download, it holds
    what an earlier try of the same download has brought, so that gigabytes come but once.
    """
    mark = f".{hashlib.sha256(resume.encode()).hexdigest()[:12]}" if resume else ""
    staging = folder.parent / f".{folder.name}{mark}.partial"
    if not resume:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            if not path.is_symlink():  # what a link leads to is the user's
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors files are written 0600
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        if not resume:
            shutil.rmtree(staging, ignore_errors=True)


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
