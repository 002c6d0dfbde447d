"""Writes ``hparams.schema.json``: what the hyper-parameters of every editor may be.

The workflow reads that file to refuse a wrong hyper-parameter before any job starts, which it
could not do from the editors' dataclasses: they need torch. After a change of an editor's
``Hparams``: ``python -m kmebench.editors.hparams_schema``; a test compares the two.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from kmebench.editors.registry import EDITORS, editor_target

FILE = Path(__file__).with_name("hparams.schema.json")
#: A number written as text, as YAML reads ``1e-4``, is taken as a number.
_NUMBER = r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"
#: Whole numbers that may be 0: an index, and what may be left out.
_FROM_0 = ("layer", "negatives", "steps")


def hparams_schema() -> dict[str, Any]:
    """Return editor name -> JSON schema of its hyper-parameters, under their config names."""
    schemas = {}
    for name in EDITORS:
        module, class_name = editor_target(name)
        hparams = getattr(importlib.import_module(module), class_name).Hparams
        schema = TypeAdapter(hparams).json_schema()
        schemas[name] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                key.rstrip("_"): _readable(key, value)
                for key, value in schema["properties"].items()
            },
        }
    return schemas


def _readable(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Drop titles, let a number be written as text, and bound it: none is negative.

    Whole numbers count something, from 1 where none of it is no edit at all.
    """
    kept: dict[str, Any] = {key: value for key, value in schema.items() if key != "title"}
    if "anyOf" in kept:
        kept["anyOf"] = [_readable(name, each) for each in kept["anyOf"]]
    if kept.get("type") in ("number", "integer"):
        smallest = 0 if kept["type"] == "number" or name in _FROM_0 else 1
        kept |= {"type": [kept["type"], "string"], "pattern": _NUMBER, "minimum": smallest}
    if kept.get("type") == "array":
        kept |= {"minItems": 1, "items": kept["items"] | {"minimum": 0}}
    return kept


if __name__ == "__main__":
    FILE.write_text(json.dumps(hparams_schema(), indent=1) + "\n", encoding="utf-8")
