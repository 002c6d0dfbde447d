"""Building editors from the config."""

import pytest
import yaml
from kmebench.editors.registry import EDITORS

from kmebench.editors.base import Editor, build_editor, resolved
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError


@pytest.mark.parametrize("name", EDITORS)
def test_every_registered_editor_builds_with_its_defaults(name):
    assert isinstance(build_editor(name, {}, {}), Editor)


def test_config_names_lose_the_underscore_that_python_needs():
    editor = build_editor("pac", {"lambda": 0.3}, {})
    assert editor.hparams.lambda_ == 0.3
    assert resolved(editor)["lambda"] == 0.3


def test_a_misspelt_editor_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no editor 'pca'.*did you mean 'pac'"):
        build_editor("pca", {}, {})


def test_an_unknown_hyper_parameter_lists_the_known():
    with pytest.raises(ConfigError, match="'pac' has no hyper-parameter 'lamda'; it has paths,"):
        build_editor("pac", {"lamda": 0.1}, {})


@pytest.mark.parametrize(
    ("hparams", "complaint"),
    [
        ({"steps": "many"}, "'pac': hyper-parameter steps cannot be 'many': .*integer"),
        ({"lambda": None}, "hyper-parameter lambda cannot be None: .*number"),
        ({"score": "l3"}, "hyper-parameter score cannot be 'l3': .*'l2'"),
        ({"steps": 2.5}, "hyper-parameter steps cannot be 2.5: .*integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(hparams, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build_editor("pac", hparams, {})


def test_a_number_that_yaml_reads_as_text_is_a_number():
    text = "{learning_rate: 1e-4}"
    assert yaml.safe_load(text) == {"learning_rate": "1e-4"}
    assert build_editor("pac", yaml.safe_load(text), {}).hparams.learning_rate == 1e-4


class Nothing(Editor):
    """An editor from outside the library."""

    from kmebench.editors.finetune.full_c import FullCHparams as Hparams

    def edit(self, model, requests):
        return WeightDelta({})


def test_an_editor_of_ones_own_is_named_by_its_import_path(monkeypatch, tmp_path):
    (tmp_path / "my_editor.py").write_text("from tests.editors.test_base import Nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build_editor("my_editor:Nothing", {"steps": 3}, {})).__name__ == "Nothing"


def test_an_import_path_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_editor("no_such_package:Editor", {}, {})
