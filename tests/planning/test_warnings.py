"""What is told before anything runs."""

import copy
from pathlib import Path

import pytest
import yaml

from kmebench.planning.config import check_config, read_config
from kmebench.planning.warnings import absent, warnings_of

TINY = {
    "experiments": {
        "main": {
            "mode": "batch",
            "models": ["tiny-gptj"],
            "datasets": ["openfacts-zsre"],
            "methods": ["none", "memit", "full-c", "pac", "lora"],
        }
    },
    "tables": {},
    "figures": {},
}


@pytest.fixture
def config():
    config = read_config(Path("config.yaml")) | copy.deepcopy(TINY)
    config["models"]["tiny-gptj"]["hparams"] = {"pac": {"paths": 3}, "memit": {"layers": [1, 2]}}
    return config


def told(config):
    check_config(config)
    return warnings_of(config)


def test_methods_whose_values_were_chosen_for_no_model_are_named_once(config):
    config["experiments"]["again"] = TINY["experiments"]["main"] | {"mode": "consecutive"}
    (warning,) = told(config)
    assert warning.startswith("tiny-gptj: full-c, lora run untuned, with defaults alone;")
    assert "config/tuned/" in warning
    assert "models.tiny-gptj.hparams" in warning


def test_values_of_one_pipeline_are_no_choice_for_another(config):
    config["models"]["tiny-gptj"]["hparams"] |= {
        "full-c": {"batch": {"steps": 3}},
        "lora": {"consecutive": {"steps": 3}},
    }
    (warning,) = told(config)
    assert warning.startswith("tiny-gptj: lora run")


def test_a_search_warns_of_nothing(config):
    config["experiments"]["main"] |= {"datasets": ["openfacts-zsre.development"]}
    assert told(config) == []


def test_no_value_that_a_search_chose_is_called_untuned():
    config = read_config(Path("config.yaml"))
    for file in Path("config/tuned").glob("*.yaml"):
        for model, spec in yaml.safe_load(file.read_text())["models"].items():
            for method, values in spec["hparams"].items():
                mode = "batch" if "batch" in values else "consecutive"
                one = {"mode": mode, "models": [model], "methods": [method]}
                experiments = {"one": one | {"datasets": ["openfacts-zsre"]}}
                run = config | {"experiments": experiments, "tables": {}, "figures": {}}
                assert not any("untuned" in warning for warning in told(run)), file


def test_a_folder_and_a_data_file_that_are_not_there_are_named(config, tmp_path, monkeypatch):
    monkeypatch.delenv("KMEBENCH_DATA_MIRROR", raising=False)
    source = {"source": "file", "filenames": ["facts.json"]}
    config["datasets"]["mine"] = {"source": source, "schema": "mend", "n": 2, "development": 2}
    config["experiments"]["main"]["datasets"] = ["mine.development"]
    config["models"]["tiny-gptj"]["source"] = {"source": "folder", "path": str(tmp_path / "model")}
    check_config(config)
    (model, data) = absent(config)
    assert model.startswith(f"tiny-gptj: {tmp_path}/model does not exist")
    assert data.startswith("mine: facts.json has no URL, and no mirror folder is set")
    config["data_mirror"] = str(tmp_path)
    (_, data) = absent(config)
    assert f"it is not in the folder {tmp_path}" in data
    (tmp_path / "model").mkdir()
    (tmp_path / "facts.json").write_text("[]")
    assert absent(config) == []


@pytest.mark.parametrize(("tokens", "warned"), [(95, True), (96, False)])
def test_four_tokens_are_asked_for_each_dimension(tokens, warned, config):
    shape = {"layers": 4, "width": 8, "ffn_width": 24, "parameters": 1000}
    config["models"]["tiny-gptj"]["shape"] = shape
    config["covariance"]["tokens"] = tokens
    config["experiments"]["main"] |= {"methods": ["memit"]}
    expected = ["tiny-gptj: 95 tokens estimate the covariance of keys of width 24 poorly"]
    assert [w.partition(",")[0] for w in told(config)] == expected * warned
    config["experiments"]["main"]["methods"] = ["pac"]
    assert told(config) == []
