"""docs/editors-values.md, written from the cards. Imports no torch.

python -m kmebench.planning.values_page > docs/editors-values.md
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from kmebench.editors.cards import Card, registered

_KINDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """Return the page: a section for each editor of this library, in the order of the cards."""
    own = [card for card in registered().values() if card.module.startswith("kmebench.")]
    begin = (
        "# The values of all editors\n\n"
        "Written from the editors' cards (`python -m kmebench.planning.values_page`). A method\n"
        "of the config sets them under `hparams`; what it does not set has the default.\n"
    )
    return "\n".join([begin, *map(section, own)])


@dataclass(frozen=True)
class Row:
    """A hyper-parameter in words."""

    name: str
    default: str  # as JSON
    allowed: str
    meaning: str  # a sentence, with the unit


def rows(card: Card) -> list[Row]:
    """Return an editor's hyper-parameters, under their config names."""
    properties = TypeAdapter(card.hparams).json_schema()["properties"]
    return [_row(name, rules) for name, rules in properties.items()]


def _row(name: str, rules: Mapping[str, Any]) -> Row:
    unit = f" ({rules['unit']})" if rules.get("unit") else ""
    meaning = rules.get("description", "").rstrip(".") + unit
    return Row(name, json.dumps(rules["default"]), _allowed(rules), f"{meaning}.")


def section(card: Card) -> str:
    """Return an editor's heading and the table of its values."""
    lines = [f"## {card.name}", "", *_about(card)]
    found = rows(card)
    if found:
        lines += ["| value | default | may be | meaning |", "|---|---|---|---|"]
    else:
        lines.append("It has no values.")
    for row in found:
        cells = [f"`{row.name}`", f"`{row.default}`", row.allowed, row.meaning]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _about(card: Card) -> list[str]:
    """Say how it edits, and whose it is."""
    return [*filter(None, [card.summary, f"{card.citation}."]), ""]


def _allowed(rules: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in rules:
        return " or ".join(_allowed(each) for each in rules["anyOf"])
    if "enum" in rules:
        return ", ".join(f"`{each}`" for each in rules["enum"])
    if rules["type"] == "array":
        return f"list of {_allowed(rules['items'])}"
    bounds = [f"{sign} {rules[key]}" for key, sign in _BOUNDS.items() if key in rules]
    return " ".join([_KINDS[rules["type"]], ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(page(), end="")
