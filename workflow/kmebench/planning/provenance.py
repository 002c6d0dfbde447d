"""Where each value of a run comes from: a file of the config, or a default. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmebench.editors.cards import plain
from kmebench.errors import ConfigError
from kmebench.names import nearest
from kmebench.planning import grid

#: Keys that runs read besides their hyper-parameters.
_GENERAL = (
    ("seed",),
    ("batch_size",),
    ("checkpoint_every",),
    ("milestone_sample",),
    ("on_failed_edit",),
    ("device",),
    ("evaluation", "batch_size"),
    ("evaluation", "wild_max_tokens"),
    ("health", "texts"),
    ("health", "length"),
    ("health", "seed"),
)
_OF_MODEL = ("dtype", "device")


@dataclass(frozen=True)
class Value:
    """A value, the key of the config that sets it, and the file that does."""

    name: str
    value: Any
    key: str  # empty where no file sets it
    source: str  # a file, or whose default it is


def cell_of(config: Mapping[str, Any], text: str) -> tuple[str, str, str]:
    """Read ``MODEL/METHOD/MODE``.

    Raises:
        ConfigError: it is not of that form, or a part of it is not there; names the nearest.
    """
    parts = text.split("/")
    if len(parts) != 3:
        raise ConfigError(f"--explain {text} is not of the form MODEL/METHOD/MODE.")
    model, method, mode = parts
    grid.check_name(model, config["models"], "models", "--explain")
    grid.check_name(method, config["methods"], "methods", "--explain")
    if mode not in grid.MODES:
        raise ConfigError(f"--explain: there is no mode {mode!r}; {nearest(mode, grid.MODES)}")
    return model, method, mode


def values_of(
    config: Mapping[str, Any],
    files: Mapping[Path, Mapping[str, Any]],
    model: str,
    method: str,
    mode: str,
) -> list[Value]:
    """Return every value of a method's runs on a model: hyper-parameters, then what is general.

    ``config`` is checked; ``files`` are those that it was merged from, later ones over earlier.
    """
    card = grid.card_of_method(config, method)
    sections = list(grid.hparams_sections(config, model, method, mode))
    values = plain(card.values(grid.base_hparams(config, model, method, mode)))
    found = []
    for name, value in values.items():
        places = [place for place, settings in sections if name in settings]
        spelled = [key for key, own in card.names.items() if own == name]
        keys = [(*place, key) for place in places[-1:] for key in spelled]
        default = f"default of the editor {card.name}"
        found.append(_value(name, value, keys, files, default))
    return found + list(_general(config, files, model))


def _general(
    config: Mapping[str, Any], files: Mapping[Path, Mapping[str, Any]], model: str
) -> Iterator[Value]:
    """Yield what is not the editor's, the model's own values instead of general ones."""
    spec = config["models"][model]
    own = [("models", model, key) for key in _OF_MODEL if key in spec]
    covered = {path[-1] for path in own}
    for path in (*own, *(p for p in _GENERAL if p[-1] not in covered)):
        yield _value(".".join(path), _at(config, path), [path], files, "default of the workflow")


def _value(
    name: str,
    value: Any,
    places: list[tuple[str, ...]],
    files: Mapping[Path, Mapping[str, Any]],
    default: str,
) -> Value:
    """Look for the last file that sets a value at the last of its places."""
    for place in places:
        setting = [file for file, part in files.items() if _at(part, place) is not _UNSET]
        if setting:
            return Value(name, value, ".".join(place), str(setting[-1]))
    return Value(name, value, "", default)


_UNSET = object()


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return _UNSET
        node = node[key]
    return node
