"""Values of options on the command line: each is checked before anything is loaded.

Functions for argparse's ``type``. They raise :class:`ConfigError`, which is shown as one sentence.
Nothing here imports torch.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kmebench import values
from kmebench.data.texts import clean
from kmebench.errors import ConfigError
from kmebench.io.writable import check_writable
from kmebench.planning.overlays import read_yaml

PLOTS = (".png", ".pdf", ".svg")


def model(text: str) -> str:
    """A model's name, or a folder."""
    _path("--model", text)
    return text


def count(option: str) -> Callable[[str], int]:
    """A whole number from 1."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\+?[0-9]{1,9}", text) or int(text) < 1:
            raise ConfigError(f"{option} cannot be {text!r}: it is a whole number from 1.")
        return int(text)

    return convert


def neighbour(text: str) -> str:
    """A prompt that can be asked."""
    try:
        return clean(text, "--neighbour")
    except ValueError as error:
        raise ConfigError(f"A neighbour cannot be asked: {error}.") from error


def setting(text: str) -> dict[str, Any]:
    """NAME=VALUE, the value as YAML writes it or as the name of a run's folder does."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise ConfigError(
            f"--set {text} is not of the form NAME=VALUE, such as steps=10 or layers=[0,1]."
        )
    typed = values.read(value)
    if isinstance(typed, str):
        try:
            typed = read_yaml(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {text}: the value cannot be read; write a number, a word, true, false, "
                "null or a list such as [0,1]."
            ) from error
    return {name: typed}


def existing_file(option: str) -> Callable[[str], Path]:
    """A file that can be read."""

    def convert(text: str) -> Path:
        path = _path(option, text)
        if path.is_dir():
            raise ConfigError(f"{option} names the folder {path}; name a file.")
        if not path.is_file():
            raise ConfigError(f"{option} names {path}, and there is no such file.")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{option} names {path}, which you may not read.")
        return path

    return convert


def existing_folder(option: str) -> Callable[[str], Path]:
    """A folder that is there."""

    def convert(text: str) -> Path:
        path = _path(option, text)
        if not path.is_dir():
            raise ConfigError(f"{option} names {path}, and there is no such folder.")
        return path

    return convert


def model_folder(text: str) -> Path:
    """A Hugging Face folder."""
    folder = existing_folder("FOLDER")(text)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no Hugging Face model: it has no config.json.")
    return folder


def new_file(option: str, endings: tuple[str, ...] = ()) -> Callable[[str], Path]:
    """A file that can be written, of one of ``endings``; an older one is replaced."""

    def convert(text: str) -> Path:
        path = _path(option, text)
        if endings and path.suffix.lower() not in endings:
            raise ConfigError(
                f"{option} cannot be {text!r}: name a file that ends in {', '.join(endings)}."
            )
        if path.is_dir():
            raise ConfigError(f"{option} names the folder {path}; name a file.")
        check_writable(option, path, path.parent)
        return path

    return convert


def new_folder(option: str) -> Callable[[str], Path]:
    """A folder that does not exist and can be made."""

    def convert(text: str) -> Path:
        path = _path(option, text)
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already; name another folder, or delete it.")
        check_writable(option, path, path.parent)
        return path

    return convert


def _path(option: str, text: str) -> Path:
    """A path that the operating system can look at."""
    if not text:
        raise ConfigError(f"{option} is empty; name a path.")
    path = Path(text)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # not permitted, too long, a loop, a null
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{option} cannot be {text!r}: {reason}.") from error
    return path
