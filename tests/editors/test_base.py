"""Cards, and editors built from them."""

import re

import pytest
import yaml

from kmebench.editors import cards
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.cards import Card, card_of, plain, registered
from kmebench.errors import ConfigError


@pytest.mark.parametrize("name", registered())
def test_every_registered_editor_builds_with_its_defaults(name):
    editor = build_editor(name, {}, {})
    assert isinstance(editor, Editor)
    assert editor.name == name


@pytest.mark.parametrize("name", registered())
def test_every_value_of_a_card_has_a_sentence_and_reads_back(name):
    card = registered()[name]
    values = plain(card.values({}))
    fields = card.hparams.__pydantic_fields__.values()
    assert all(field.description.endswith(".") for field in fields)
    assert plain(card.values(values)) == values
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_the_config_name_of_a_keyword_is_the_keyword():
    editor = build_editor("pac", {"lambda": 0.3}, {})
    assert editor.hparams.contrast == 0.3
    assert plain(editor.hparams)["lambda"] == 0.3
    assert build_editor("pac", {"contrast": 0.3}, {}).hparams == editor.hparams


def test_one_value_under_two_names_is_refused():
    with pytest.raises(ConfigError, match="lambda is set twice, once as contrast"):
        build_editor("pac", {"lambda": 0.3, "contrast": 0.2}, {})


def test_a_validator_of_several_values_is_a_sentence():
    @cards.hyperparameters
    class Both:
        a: int = 1
        b: int = 2

        def __post_init__(self):
            if self.a > self.b:
                raise ValueError("a is larger than b")

    card = Card("both", "x:Y", Both, "own", "me")
    with pytest.raises(ConfigError, match="'both' cannot take these values: a is larger than b"):
        card.values({"a": 3})


def test_a_misspelt_editor_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no editor 'pca'.*did you mean 'pac'"):
        build_editor("pca", {}, {})


def test_an_unknown_hyper_parameter_names_the_nearest():
    with pytest.raises(ConfigError, match="'pac' has no hyper-parameter 'lamda'; did you mean 'la"):
        build_editor("pac", {"lamda": 0.1}, {})


@pytest.mark.parametrize(
    ("hparams", "complaint"),
    [
        ({"steps": "many"}, "steps cannot be 'many' in the editor 'pac': .*integer"),
        ({"steps": True}, "steps cannot be True .* a number is expected"),
        ({"lambda": None}, "lambda cannot be None .*number"),
        ({"score": "l3"}, "score cannot be 'l3' .*'l2'"),
        ({"steps": 2.5}, "steps cannot be 2.5 .*integer"),
        ({"learning_rate": float("inf")}, "learning_rate cannot be inf .*finite"),
        ({"paths": 0}, "paths cannot be 0 .*greater than or equal to 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(hparams, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build_editor("pac", hparams, {})


def test_a_number_that_yaml_reads_as_text_is_a_number():
    text = "{learning_rate: 1e-4}"
    assert yaml.safe_load(text) == {"learning_rate": "1e-4"}
    assert build_editor("pac", yaml.safe_load(text), {}).hparams.learning_rate == 1e-4


def test_an_editor_of_ones_own_is_named_by_the_import_path_of_its_card(monkeypatch, tmp_path):
    (tmp_path / "my_editor.py").write_text(
        "from kmebench.editors.cards import Card, card_of\n"
        "from kmebench.editors.base import Editor\n"
        "class Nothing(Editor):\n"
        "    def edit(self, model, requests):\n"
        "        return {}\n"
        "CARD = Card('nothing', 'my_editor:Nothing', card_of('full-c').hparams, 'own', 'me')\n"
        "ELSE = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    editor = build_editor("my_editor:CARD", {"steps": 3}, {})
    assert type(editor).__name__ == "Nothing"
    assert editor.hparams.steps == 3
    with pytest.raises(ConfigError, match="my_editor:ELSE is no card but a int"):
        build_editor("my_editor:ELSE", {}, {})


@pytest.mark.parametrize("name", ["no_such_package:CARD", "kmebench.editors.base:NOTHING"])
def test_an_import_path_that_does_not_exist_is_refused(name):
    with pytest.raises(ConfigError, match=f"The card '{re.escape(name)}' cannot be imported"):
        build_editor(name, {}, {})


def test_two_editors_of_one_name_are_refused(monkeypatch):
    class Point:
        value = "kmebench.editors.pac.cards:PAC"

    twice = Card("pac", "x:Y", card_of("pac").hparams, "own", "me")
    monkeypatch.setattr(cards, "entry_points", lambda group: [Point])
    monkeypatch.setattr(cards, "_card", lambda target: twice)
    registered.cache_clear()
    with pytest.raises(ConfigError, match="Two installed editors are called 'pac'"):
        registered()
    monkeypatch.undo()
    registered.cache_clear()
