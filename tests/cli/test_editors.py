"""``kmebench editors``: what the cards say."""

import dataclasses

import pytest

from kmebench.cli.editors import needs
from kmebench.cli.main import main
from kmebench.cli.terminal import console
from kmebench.editors.cards import registered
from kmebench.editors.needs import Covariance


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """A row is a line, however wide the terminal is that runs the tests."""
    monkeypatch.setattr(console, "width", 1000)


def test_every_editor_is_listed_on_a_line(capsys):
    assert main(["editors"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, card in registered().items():
        (line,) = (words for words in lines if words[:1] == [name])
        assert line[1] == card.family
        assert card.summary in " ".join(line)


@pytest.mark.parametrize("card", registered().values(), ids=lambda card: card.name)
def test_every_editor_says_how_it_edits_and_what_its_values_are(card, capsys):
    assert card.summary.endswith(".")
    assert len(card.summary.split()) <= 25
    assert main(["editors", card.name]) == 0
    shown = capsys.readouterr().out
    assert card.citation in shown
    rows = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert all(name in rows for name in card.names.values())


def test_what_an_editor_needs_in_one_mode_alone_names_it():
    card = registered()["memit"]
    assert needs(card) == "inverse, targets (batch)"
    assert needs(registered()["full-c"]) == "nothing"
    always = dataclasses.replace(card, needs=lambda hparams, pipeline: (Covariance((1,)),))
    assert needs(always) == "covariance"
