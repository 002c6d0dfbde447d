"""What is wrong with a config, in one sentence that a stranger to JSON schema understands."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonschema.exceptions import ValidationError

from kmebench.names import near_name, nearest

#: What each file of a config holds; later ones win.
Files = Mapping[Path, Any] | Mapping[Path | str, Any]
#: JSON schema's names of types.
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys with values",
    "null": "null",
}


def sentence(error: ValidationError, files: Files) -> str:
    """Turn a validation error into a sentence; ``files`` are those that the config is merged of."""
    rules = error.schema if isinstance(error.schema, dict) else {}
    where = list(error.absolute_path)
    if error.validator == "additionalProperties" and "properties" in rules:
        unknown = next(key for key in error.instance if key not in rules["properties"])
        begun = wrong_at(where, files, key=[*where, unknown])
        return f"{begun}: there is no key {unknown!r}; {nearest(unknown, rules['properties'])}"
    description = rules.get("description", "").rstrip(".")
    hint = f" ({description})" if description else ""
    near = _meant(error)
    end = f"; did you mean {near!r}?" if near else "."
    return f"{wrong_at(where, files)}: {_complaint(error, description)}{hint}{end}"


def wrong_at(
    parts: Sequence[str | int],
    files: Files | None = None,
    key: Sequence[str | int] | None = None,
) -> str:
    """Begin a sentence, on one line whatever a key holds.

    It names the last of ``files`` in which ``parts`` stand, or the ``key`` below them.
    """
    wrong = [str(path) for path, part in (files or {}).items() if _stands(part, key or parts)]
    where = re.sub(r"\s+", " ", ".".join(map(str, parts))) or "the top level"
    return f"{wrong[-1] if wrong else 'The config'} is wrong at {where}"


def _stands(node: Any, parts: Sequence[str | int]) -> bool:
    """Whether a file holds a key."""
    for part in parts:
        try:
            node = node[part]
        except (LookupError, TypeError):
            return False
    return True


def _complaint(error: ValidationError, description: str) -> str:
    """Say what is wrong with a value."""
    rule, value = error.validator_value, error.instance
    match error.validator:
        case "type":
            types = [rule] if isinstance(rule, str) else rule
            return f"{value!r} is not {_or(_TYPES[name] for name in types)}"
        case "required":
            missing = next(name for name in rule if name not in value)
            return f"the key {missing!r} is missing"
        case "enum":
            return f"{value!r} is not one of {', '.join(map(_shown, rule))}"
        case "minimum":
            return f"{value!r} is too small, the least is {rule}"
        case "maximum":
            return f"{value!r} is too large, the most is {rule}"
        case "minItems" | "minProperties" | "minLength":
            return f"{value!r} is too short, the least is {rule}"
        case "maxItems" | "maxLength":
            return f"{value!r} is too long, the most is {rule}"
        case "uniqueItems":
            return f"an entry of {value!r} stands twice"
        case "pattern" if description:
            return f"{value!r} is not of the right form"
    return error.message


def _shown(value: Any) -> str:
    """Return a value as YAML writes it, texts in quotes."""
    return "null" if value is None else repr(value)


def _or(names: Iterable[str]) -> str:
    """Return A, B or C."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _meant(error: ValidationError) -> str | None:
    """Return what a text was meant to be: the nearest of a list, or in a name's letters."""
    text = error.instance
    if not isinstance(text, str):
        return None
    if error.validator == "enum":
        return near_name(text, [each for each in error.validator_value if each])
    if error.validator == "pattern":
        spelled = (text.lower(), re.sub(r"[\s_]+", "-", text.lower()))
        return next((each for each in spelled if re.search(error.validator_value, each)), None)
    return None
