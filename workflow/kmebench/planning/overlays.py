"""Reading one YAML file of a config: the config itself, tuned values, an overlay."""

import re
from pathlib import Path
from typing import Any

import yaml

from kmebench.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML's plain types; refuses what plain YAML would read as something else without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that stands twice: the first of its values would be lost."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice; take one out"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Say where a value is that looks like a date or a number and is none."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            problem = "this looks like a date or a number and is none; put it in quotes"
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, problem, mark) from error


def read_yaml(text: str) -> Any:
    """Read YAML of plain types.

    Raises:
        yaml.YAMLError: the text is no YAML, has a key twice, or nests without end.
    """
    try:
        # Made by hand, as yaml.load does: a loader derived from the safe one is as safe.
        loader = _Loader(text)
        try:
            found = loader.get_single_data()
        finally:
            loader.dispose()
        _walk([found])
        return found
    except RecursionError:
        raise yaml.YAMLError("it nests too deeply, or within itself") from None


def _walk(node: Any) -> None:
    """Visit all that is below a node, which never ends where an alias stands for its own parent."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            _walk(child)


def read_overlay(path: str | Path) -> dict[str, Any]:
    """Read one file of a config.

    Raises:
        ConfigError: it cannot be read, or holds no mapping of keys; names the file, the place
            and the mend.
    """
    path = Path(path)
    if "\0" in str(path):  # Python's own word for it would be of another kind
        raise ConfigError(f"There is no config {str(path)!r}.")
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no config {path}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a config file in it.") from None
    except OSError as error:
        raise ConfigError(f"The config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The config {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The config {path} is not YAML{_complaint(error)}.") from error
    if not isinstance(found, dict):
        kind = {type(None): "nothing", list: "a list", str: "a text"}.get(type(found), "a value")
        raise ConfigError(
            f"The config {path} holds {kind} at its top; it must hold keys there, such as "
            "“models:” or “experiments:”."
        )
    return found


def _complaint(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return ": " + re.sub(r"\s+", " ", str(error))
    mark = error.problem_mark or error.context_mark
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = error.problem or ""
    if problem.startswith("but "):  # goes on from "expected a single document"
        problem = f"{error.context}, {problem}"
    hint = "; indent by blanks, not by tabs" if "'\\t'" in problem else ""
    return f"{place}: {problem}{hint}"
