"""Values of hyper-parameters as parts of a file's name, and read back. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any

from kmebench.errors import ConfigError

#: Joins the parts of a file's name. Not a comma: Snakemake's jobs on a cluster fail at one.
JOIN = "+"
#: Joins the items of a list; stands behind the item of a list of one.
LIST = ":"
#: ``{dataset}.development`` is the held-out split of a data set, itself a data set to run on.
DEVELOPMENT = ".development"
#: ``{dataset}.training`` is the split that hyper-networks are trained on.
TRAINING = ".training"
_NAMEABLE = re.compile(r"[\w.-]+")
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")


def spell_all(values: Mapping[str, Any]) -> str:
    """Name a file by values, such that :func:`read_all` reads them back: ``paths=20+layers=1:2``.

    Raises:
        ConfigError: a value cannot be part of a file's name.
    """
    parts = []
    for key, value in values.items():
        try:
            parts.append(f"{key}={spell(value)}")
        except ValueError as error:
            raise ConfigError(
                f"{key}: {error}: make it a method of its own, with that hyper-parameter."
            ) from error
    return JOIN.join(parts)


def read_all(text: str) -> dict[str, Any]:
    """Read values back: ``paths=20+layers=1:2`` -> {"paths": 20, "layers": [1, 2]}."""
    pairs = (item.partition("=") for item in text.split(JOIN) if item)
    return {key: read(value) for key, _, value in pairs}


def spell(value: Any) -> str:
    """Spell a value as Python does, ``[1, 2]`` as ``1:2``, ``[1]`` as ``1:``, ``[]`` as ``:``.

    Raises:
        ValueError: it cannot be part of a file's name, or would not be read back.
    """
    if not isinstance(value, list | tuple):
        return _spell_one(value)
    items = [_spell_one(item) for item in value]
    return LIST.join(items) + (LIST if len(items) < 2 else "")


def read(text: str) -> Any:
    """Read a value back: a number, True, False, None, a text, or a list of these."""
    if LIST not in text:
        return _read_one(text)
    items = text.removesuffix(LIST).split(LIST)
    return [] if items == [""] else [_read_one(item) for item in items]


def _spell_one(value: Any) -> str:
    text = str(value)
    is_number = isinstance(value, float | str) and _NUMBER.fullmatch(text)
    if is_number:  # without the plus of 1e+16, which joins hyper-parameters
        text = text.replace("e+", "e")
    back = _read_one(text)
    # A number as text, as YAML reads 1e-4, comes back as the number.
    unlike = (type(back), back) != (type(value), value) and not is_number
    if unlike or not _NAMEABLE.fullmatch(text):
        raise ValueError(f"{value!r} cannot be part of a file's name")
    return text


def _read_one(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"True": True, "False": False, "None": None}.get(text, text)
