"""Hyper-parameters in a config, checked before any job starts. Imports no torch."""

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from kmebench.errors import ConfigError
from kmebench.names import nearest
from kmebench.planning import grid


def check_hparams(config: Mapping[str, Any]) -> None:
    """Refuse what an editor of the registry has no hyper-parameter for, or no such value.

    Editors of one's own (``package.module:Class``) are checked when their first job starts.

    Raises:
        ConfigError: names the key and, for an unknown name, the nearest one.
    """
    for where, method, hparams in _places(config):
        editor = grid.editor_of(config, method)
        check_values(where, editor, hparams)


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (key, method, hyper-parameters) of every place that sets some."""
    for method, spec in config["methods"].items():
        yield from _sections(f"methods.{method}.hparams", method, spec.get("hparams", {}))
    for model, spec in config["models"].items():
        for method, hparams in spec.get("hparams", {}).items():
            where = f"models.{model}.hparams"
            grid.check_name(method, config["methods"], "methods", where)
            yield from _sections(f"{where}.{method}", method, hparams)
    for name, spec in config["experiments"].items():
        for parameter, values in spec.get("sweep", {}).items():
            for method in spec["methods"]:
                for value in values:
                    yield f"experiments.{name}.sweep", method, {parameter: value}
    for name, spec in config["comparisons"].items():
        for pair, sides in spec["pairs"].items():
            for side in "ab":
                where = f"comparisons.{name}.pairs.{pair}.{side}.hparams"
                yield where, sides[side]["method"], sides[side].get("hparams", {})


def _sections(
    where: str, method: str, hparams: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield what holds in every mode, then what holds in one."""
    general, by_mode = grid.split_modes(hparams)
    yield where, method, general
    for mode, values in by_mode.items():
        yield f"{where}.{mode}", method, values


def check_values(where: str, editor: str, hparams: Mapping[str, Any]) -> None:
    """Refuse values that an editor of the registry does not take; ``where`` names their place.

    Raises:
        ConfigError: as :func:`check_hparams`.
    """
    schema = _schemas().get(editor)
    if schema is None:
        return
    for name in hparams:
        if name not in schema["properties"]:
            raise ConfigError(
                f"{where}: the editor {editor!r} has no hyper-parameter {name!r}; "
                f"{nearest(name, schema['properties'])}"
            )
    typed = {name: _typed(value) for name, value in hparams.items()}
    error = best_match(Draft202012Validator(schema).iter_errors(typed))
    if error:
        name = error.absolute_path[0]
        raise ConfigError(f"{where}: {name} cannot be {hparams[name]!r}: {error.message}.")
    for name, value in typed.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name} cannot be {value}: it must be finite.")


def _typed(value: Any) -> Any:
    """A number that is written as text, as YAML reads ``1e-4``, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@cache
def _schemas() -> dict[str, Any]:
    """Editor name -> JSON schema of its hyper-parameters (see editors/hparams_schema.py)."""
    file = resources.files("kmebench.editors") / "hparams.schema.json"
    schemas: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schemas
