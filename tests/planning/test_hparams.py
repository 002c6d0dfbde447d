"""Wrong hyper-parameters are refused before anything runs, wherever a config may set them."""

import copy
from pathlib import Path

import pytest

from kmebench.errors import ConfigError
from kmebench.planning.config import read_checked_config
from kmebench.planning.hparams import check_hparams

CONFIG = read_checked_config(Path("config.yaml"))


@pytest.fixture
def config():
    return copy.deepcopy(CONFIG)


def in_a_method(config, hparams):
    config["methods"]["pac"]["hparams"] = hparams


def in_a_model(config, hparams):
    config["models"]["tiny-gptj"]["hparams"]["pac"] = hparams


def in_a_sweep(config, hparams):
    config["experiments"]["ablation-paths"]["sweep"] = {k: [v] for k, v in hparams.items()}


def in_a_comparison(config, hparams):
    sides = {"a": {"method": "pac", "hparams": hparams}, "b": {"method": "full-c"}}
    config["comparisons"]["mine"] = {"pairs": {"one": sides}}


def in_a_mode_of_a_method(config, hparams):
    config["methods"]["pac"]["hparams"] = {"paths": 5, "batch": hparams}


def in_a_mode_of_a_model(config, hparams):
    config["models"]["tiny-gptj"]["hparams"]["pac"] = {"consecutive": hparams}


PLACES = {
    "methods.pac.hparams": in_a_method,
    "methods.pac.hparams.batch": in_a_mode_of_a_method,
    "models.tiny-gptj.hparams.pac": in_a_model,
    "models.tiny-gptj.hparams.pac.consecutive": in_a_mode_of_a_model,
    "experiments.ablation-paths.sweep": in_a_sweep,
    "comparisons.mine.pairs.one.a.hparams": in_a_comparison,
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("hparams", "complaint"),
    [
        ({"learnin_rate": 0.1}, "the editor 'pac' has no .*'learnin_rate'; did you mean 'learning"),
        ({"zzz": 1}, "no hyper-parameter 'zzz'; there are "),
        ({"paths": "many"}, "paths cannot be 'many'"),
        ({"paths": 1.5}, "paths cannot be 1.5"),
        ({"paths": "1.5"}, "paths cannot be '1.5'"),
        ({"paths": 0}, "paths cannot be 0 .*greater than or equal to 1"),
        ({"negatives": -1}, "negatives cannot be -1 .*greater than or equal to 0"),
        ({"micro_batch": 0}, "micro_batch cannot be 0"),
        ({"learning_rate": -0.1}, "learning_rate cannot be -0.1"),
        ({"learning_rate": "-1e-4"}, "learning_rate cannot be '-1e-4'"),
        ({"learning_rate": float("nan")}, "learning_rate cannot be nan in .*finite"),
        ({"lambda": float("inf")}, "lambda cannot be inf"),
        ({"score": "l3"}, "score cannot be 'l3'.*l2"),
    ],
)
def test_a_wrong_hyper_parameter_is_refused_where_it_stands(config, where, hparams, complaint):
    PLACES[where](config, hparams)
    with pytest.raises(ConfigError, match=f"^{where}: .*{complaint}"):
        check_hparams(config)


@pytest.mark.parametrize("layers", [[], [-1], [1.5], 3, None])
def test_layers_are_a_list_of_indices(config, layers):
    config["methods"]["memit"]["hparams"] = {"layers": layers}
    with pytest.raises(ConfigError, match=r"methods\.memit\.hparams: layers cannot be"):
        check_hparams(config)


@pytest.mark.parametrize("where", PLACES)
def test_a_right_one_is_taken_also_as_yaml_reads_1e_4(config, where):
    PLACES[where](config, {"learning_rate": "1e-4", "lambda": 0.2})
    check_hparams(config)


def test_a_model_that_sets_something_for_no_method_is_refused(config):
    config["models"]["tiny-gptj"]["hparams"]["romme"] = {}
    with pytest.raises(ConfigError, match="did you mean 'rome'"):
        check_hparams(config)


CARD = """
from kmebench.editors.cards import Card, hyperparameters

@hyperparameters
class OwnHparams:
    size: float = 2.0

CARD = Card("own", "own_editor:Own", OwnHparams, "own", "nobody")
"""


def test_an_editor_of_ones_own_is_checked_like_the_others(config, tmp_path, monkeypatch):
    (tmp_path / "own_card.py").write_text(CARD)
    monkeypatch.syspath_prepend(tmp_path)
    config["methods"]["mine"] = {"editor": "own_card:CARD", "hparams": {"size": 1}}
    check_hparams(config)
    config["methods"]["mine"]["hparams"] = {"sise": 1}
    with pytest.raises(ConfigError, match=r"^methods\.mine.hparams: .*sise.; did you mean 'size'"):
        check_hparams(config)
    config["methods"]["mine"] = {"editor": "own_card:CADR"}
    with pytest.raises(ConfigError, match=r"The card .own_card:CADR. cannot be imported: .*CADR"):
        check_hparams(config)
