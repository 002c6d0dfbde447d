"""Cards, and editors built from them."""

import re
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
import yaml

from kmebench.editors import cards
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.cards import Card, card_of, plain, registered
from kmebench.editors.epochs import EpochEditor
from kmebench.editors.needs import Pipeline
from kmebench.edits.edit import Edit
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.errors import ConfigError, EditError


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
    with pytest.raises(ConfigError, match="lambda is set twice, once as contrast"):
        build_editor("pac", {"contrast": 0.2, "lambda": 0.3}, {})


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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with one card, under the name ``theirs``."""

    def install(code: str) -> None:
        (tmp_path / "theirs.py").write_text(
            "from dataclasses import dataclass\n"
            "from kmebench.editors.base import Editor\n"
            "from kmebench.editors.needs import Need\n"
            "from kmebench.editors.cards import Card, hyperparameters\n"
            "@hyperparameters\nclass H:\n    size: int = 1\n"
            "@hyperparameters\nclass NoDefault:\n    size: int\n"
            "@dataclass\nclass Learnt(Need):\n    asset: str\n    rule = 'train_stage'\n"
            "    def path(self, model, dataset): return 'trained/file'\n"
            "def card(needs=lambda h, p: (), name='theirs', of='theirs:Theirs', hparams=H):\n"
            "    return Card(name, of, hparams, 'own', 'me', needs)\n" + code
        )
        point = EntryPoint("theirs", "theirs:CARD", cards.ENTRY_POINTS)
        monkeypatch.setattr(cards, "entry_points", lambda group: [point])

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    cards._found.cache_clear()
    yield install
    monkeypatch.undo()
    cards._found.cache_clear()


def test_two_editors_of_one_name_are_refused_where_one_is_asked_for(install):
    install("CARD = card(name='pac')\n")
    assert card_of("full-c").name == "full-c"
    assert "pac" not in registered()
    with pytest.raises(ConfigError, match="Two installed editors are called 'pac'"):
        card_of("pac")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("def (", "'theirs:CARD' cannot be imported: SyntaxError"),
        ("raise RuntimeError('no\\nGPU')", "cannot be imported: RuntimeError: no GPU"),
        ("CARD = 3", "theirs:CARD is no card but a int"),
        ("CARD = card(name='theirs', hparams=object)", "hyper-parameters of .* cannot be used"),
        ("CARD = card(hparams=NoDefault)", "hyper-parameters of .* cannot be used"),
        ("CARD = card(name=None)", "calls its editor None"),
    ],
)
def test_a_card_that_cannot_be_used_is_told_only_to_who_asks_for_it(install, code, complaint):
    install(code)
    assert card_of("pac").name == "pac"
    assert "theirs" not in registered()
    with pytest.raises(ConfigError, match=complaint) as raised:
        card_of("theirs")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("needs", "complaint"),
    [
        ("lambda h, p: 1 / 0", "cannot say what .*ZeroDivisionError"),
        ("lambda h: ()", "cannot say what .*TypeError"),
        ("lambda h, p: None", "cannot say what"),
        ("lambda h, p: ['paths']", "needs 'paths', which is no"),
        ("lambda h, p: (Learnt('original'),)", "'theirs' needs a file under the key 'original'"),
        (
            "lambda h, p: (Learnt('code'),)",
            "the key 'code', under which its runs read another",
        ),
        ("lambda h, p: [Learnt('a'), Learnt('b'), Learnt('a')]", "the key 'a', under which"),
    ],
)
def test_needs_that_are_none_are_a_sentence(install, needs, complaint):
    install(f"CARD = card({needs})")
    card = card_of("theirs")
    with pytest.raises(ConfigError, match=complaint):
        card.needs_of(card.values({}), Pipeline("batch", 3))


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("def Theirs(hparams, assets): return 3\n", "is no class derived from"),
        ("class Theirs(Editor): pass\n", "has no method edit"),
        (
            "class Theirs(Editor):\n"
            "    def __init__(self): pass\n"
            "    def edit(self, model, requests): pass\n",
            r"is not built from \(hparams, assets\)",
        ),
    ],
)
def test_a_class_that_is_no_editor_is_a_sentence(install, code, complaint):
    install(f"{code}CARD = card()")
    with pytest.raises(ConfigError, match=f"'theirs' cannot be built: theirs:Theirs {complaint}"):
        build_editor("theirs", {}, {})


class Counting(Editor):
    """Remembers how often it was called, and returns what it is told."""

    returns = None

    def edit(self, model, requests):
        self.calls = self.calls + 1
        return self.returns

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state.get("calls", torch.zeros(()))


def test_a_singular_matrix_is_a_failed_edit_that_names_its_request(requests, monkeypatch):
    editor, singular = Counting(None, {}), torch.ones(2, 2)
    monkeypatch.setattr(editor, "edit", lambda *_: torch.linalg.solve(singular, singular))
    with pytest.raises(EditError, match=r"edit of request 'a' .batch of 3. have no solution .*;"):
        editor(None, requests)


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (None, "A NoneType is no edit"),
        (WeightDelta({"w": Dense(torch.tensor([[float("nan")]]))}), "'a' .batch of 3. holds NaN"),
    ],
)
def test_a_failed_edit_leaves_the_editor_as_it_was(requests, returned, complaint):
    editor = Counting(None, {})
    editor.returns = returned
    with pytest.raises(EditError, match=complaint):
        editor(None, requests)
    assert editor.calls == 0
    editor.returns = WeightDelta({})
    editor(None, requests)
    assert editor.calls == 1


class Given(EpochEditor):
    """Notes what its calls are given, and fails where it is told to."""

    fails = False

    def edit(self, model, requests):
        self.seen = self.micro_batch, self.after_epoch
        self.steps += 2
        with self.stopwatch("solve"):
            self.keep(1, dict)
        if self.fails:
            raise EditError("It failed.")
        return WeightDelta({})


def test_what_a_call_is_given_is_not_the_next_ones(requests):
    editor, epochs = Given(card_of("full-c").hparams(micro_batch=5), {}), []
    editor(None, requests, 2, epochs.append)
    assert editor.seen == (2, epochs.append)
    assert epochs == [1]
    editor(None, requests)
    assert editor.seen == (5, None)
    assert editor.whole_micro_batch == 5
    assert epochs == [1]


def test_a_failed_call_has_taken_what_it_took(requests):
    editor = Given(None, {})
    done = editor(None, requests)
    editor.fails = True
    with pytest.raises(EditError, match="It failed"):
        editor(None, requests)
    took = editor.result(Edit())
    assert done.steps == took.steps == 2
    assert took.seconds.keys() == {"solve"}
    assert not took.edit
