"""Hyper-parameters in a config, checked before any job starts. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from kmebench.planning import grid


def check_hparams(config: Mapping[str, Any]) -> None:
    """Refuse what an editor has no hyper-parameter for, or no such value, wherever it stands.

    Raises:
        ConfigError: begins with the place in the config; of an unknown name it says the nearest.
    """
    for where, method, hparams in _places(config):
        grid.card_of_method(config, method).values(hparams, where)


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
