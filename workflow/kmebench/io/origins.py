"""What the workflow takes from outside, and whether it has changed since. Imports no torch.

A user's data file, text or model folder may change, move or go while the config stays as it is.
Rules therefore have a digest of the content as a parameter, which Snakemake compares, and note
beside the result what they took: what is gone later, or is the same elsewhere, has not changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kmebench.io.files import sha256_of, write_json

#: What the folder of a Hugging Face model is made of; whatever else lies there is none of ours.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken"),
)
#: Where the note on a model's folder lies, among the links to its files.
NOTE = "origin.json"
#: Bytes up to which a file is known by its content. Weights are larger: to read gigabytes for
#: every plan takes minutes, so those are known by their size and the time of their last change.
_READ = 100 * 2**20


def mirror_file(filenames: Sequence[str], mirror: str) -> Path | None:
    """Return the first of ``filenames`` that lies in the mirror folder, if there is one."""
    if not mirror:
        return None
    candidates = (Path(mirror).expanduser() / name for name in filenames)
    return next((path for path in candidates if os.path.isfile(path)), None)


def model_files(folder: str | Path) -> list[Path]:
    """Return the files of a folder that belong to its model, sorted; none if there is no folder."""
    folder = Path(folder).expanduser()
    if not os.path.isdir(folder):
        return []
    return sorted(path for path in folder.iterdir() if _belongs(path.name) and path.is_file())


def _belongs(name: str) -> bool:
    """Hidden files, such as the ``._config.json`` of macOS, belong to whoever made them."""
    return not name.startswith(".") and any(fnmatchcase(name, kind) for kind in MODEL_FILES)


def digest(path: str | Path) -> str:
    """Tell the content of a file, or of the folder of a model, from another, wherever it lies.

    Raises:
        OSError: it is not there, or may not be read.
    """
    if not os.path.isdir(path):
        return _file_digest(Path(path))
    lines = [f"{file.name} {_file_digest(file)}\n" for file in model_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of(paths: Iterable[str | Path]) -> str:
    """Tell the content of several files and folders from another; see :func:`digest`."""
    digests = "".join(digest(path) for path in sorted(paths))
    return hashlib.sha256(digests.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    state = path.stat()
    if state.st_size <= _READ:
        return sha256_of(path)
    return f"{state.st_size} bytes of {state.st_mtime_ns}"


def parameter(path: str | Path | None, note: str | Path) -> str | None:
    """Return what a rule is told about the content of ``path``.

    That is its digest, unless it is gone (or None) or is what was taken: then the same as when it
    was taken.
    """
    try:
        found = None if path is None else digest(Path(path).expanduser())
    except OSError:
        found = None
    taken = _read_note(note)
    if found in (None, taken["digest"]):
        return taken["parameter"]
    # A file that was taken, then went, so that it was downloaded anew as another, and is back.
    return f"{found} again" if found == taken["parameter"] else found


def write_note(note: str | Path, told: str | None, digest: str | None) -> None:
    """Note what a rule was told (:func:`parameter`), and the digest of what it then took."""
    write_json(note, {"parameter": told, "digest": digest})


def _read_note(note: str | Path) -> dict[str, Any]:
    """Without a note, or with one that is damaged, nothing is known to have been taken.

    Raises:
        OSError: it is there and cannot be read: to take it for missing would make all anew.
    """
    try:
        taken = json.loads(Path(note).read_text(encoding="utf-8"))
        return {key: taken[key] for key in ("parameter", "digest")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"parameter": None, "digest": None}
