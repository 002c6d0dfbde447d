"""docs/editors-values.md, written from the cards. Imports no torch.

python -m kmebench.planning.values_page > docs/editors-values.md
"""

import json
from collections.abc import Mapping
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


def section(card: Card) -> str:
    """Return an editor's heading and the table of its values."""
    properties = TypeAdapter(card.hparams).json_schema()["properties"]
    lines = [f"## {card.name}", "", f"{card.citation}.", ""]
    if properties:
        lines += ["| value | default | may be | meaning |", "|---|---|---|---|"]
    else:
        lines.append("It has no values.")
    for name, rules in properties.items():
        unit = f" ({rules['unit']})" if rules.get("unit") else ""
        meaning = rules.get("description", "").rstrip(".") + unit
        cells = [f"`{name}`", f"`{json.dumps(rules['default'])}`", _allowed(rules), f"{meaning}."]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


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
