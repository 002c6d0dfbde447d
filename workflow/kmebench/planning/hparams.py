"""Hyper-parameters in a config, checked before any job starts. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from kmebench.errors import ConfigError
from kmebench.planning import grid


def check_hparams(config: Mapping[str, Any]) -> None:
    """Refuse what an editor has no hyper-parameter for, or no such value, wherever it stands.

    Raises:
        ConfigError: begins with the place in the config; of an unknown name it says the nearest.
    """
    for where, method, hparams in _places(config):
        grid.card_of_method(config, method).values(hparams, where)


def check_layers(config: Mapping[str, Any]) -> None:
    """Refuse a run whose editor takes layers that its model, by its ``shape``, does not have.

    Raises:
        ConfigError: names the run's model and method, the hyper-parameter and the keys to mend.
    """
    for run in grid.all_runs(config):
        count = config["models"][run.model].get("shape", {}).get("layers")
        if count is None:
            continue
        for name, value in grid.hparams_of(config, run).items():
            layers = _layers(name, value)
            if layers and max(layers) >= count:
                raise ConfigError(
                    f"{run.method} on {run.model}: {name} is {value}, but models.{run.model}.shape "
                    f"has {count} layers, 0 to {count - 1}; set "
                    f"models.{run.model}.hparams.{run.method}.{name}, or mend the shape."
                )


def _layers(name: str, value: Any) -> list[int]:
    """Return the layers that a hyper-parameter names, if it is one that does."""
    if name == "layer":
        value = [value]
    elif name != "layers" and not name.endswith("_layers"):
        return []
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []


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
