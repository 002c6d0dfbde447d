"""The schema that is read without torch says what the editors' dataclasses say."""

import importlib
import json
from dataclasses import asdict

import pytest
from jsonschema import Draft202012Validator
from kmebench.editors.registry import EDITORS, editor_target

from kmebench.editors import hparams_schema

SCHEMAS = json.loads(hparams_schema.FILE.read_text(encoding="utf-8"))


def test_the_file_is_what_the_editors_ask_for():
    remedy = "python -m kmebench.editors.hparams_schema writes it anew"
    assert hparams_schema.hparams_schema() == SCHEMAS, remedy


@pytest.mark.parametrize("editor", EDITORS)
def test_defaults_that_an_editor_takes_pass(editor):
    module, class_name = editor_target(editor)
    defaults = getattr(importlib.import_module(module), class_name).Hparams()
    hparams = {name.rstrip("_"): value for name, value in asdict(defaults).items()}
    plain = json.loads(json.dumps(hparams))  # tuples become lists, as in a config
    Draft202012Validator(SCHEMAS[editor]).validate(plain)
    assert set(plain) == set(SCHEMAS[editor]["properties"])
