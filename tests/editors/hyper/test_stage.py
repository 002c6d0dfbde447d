"""The stage ``hypernetwork`` in plans: its file, its split, its memory. No torch."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from kmebench.editors.cards import card_of
from kmebench.editors.needs import Hypernetwork, Pipeline
from kmebench.errors import ConfigError
from kmebench.planning import grid, memory
from kmebench.planning.by_hand import Kind, Source, method_of, workflow_path
from kmebench.planning.config import check_config, read_checked_config, read_config
from kmebench.planning.inputs import Inputs


def needed(name, **values):
    card = card_of(name)
    (need,) = card.needs_of(card.values(values), Pipeline("batch", 3))
    return need


def config_with(training, **hparams):
    config = read_config(Path("config.yaml"))
    config["experiments"]["table1"] |= {"methods": ["mend"], "models": ["tiny-gptj"]}
    config["models"]["tiny-gptj"]["hparams"]["mend"] |= hparams
    for dataset in config["datasets"].values():
        dataset["training"] = training
    check_config(config)
    return config


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_the_name_of_the_file_reads_back_and_holds_what_training_depends_on(name):
    need = needed(name)
    file = Path(need.path("m", "d"))
    assert Hypernetwork.parse(file.parent.name, file.name.removesuffix(".safetensors")) == need
    assert card_of(name).values(need.settings) == card_of(name).values({})
    assert need.path("m", "d.development") == need.path("m", "d")
    fields = set(card_of(name).names.values())
    assert set(need.settings) == fields - {"micro_batch"}
    assert needed(name, micro_batch=3) == need
    assert needed(name, seed=1).path("m", "d") != need.path("m", "d")
    assert need.path("n", "d") != need.path("m", "d") != need.path("m", "e")


def test_a_file_whose_name_would_be_too_long_is_a_sentence():
    layers = list(range(20, 40))
    with pytest.raises(
        ConfigError,
        match=r"'mend' make a file name of 2\d\d bytes, more than 215; shorten value_layers\.",
    ):
        needed("mend", value_layers=layers, key_layers=layers)


def test_a_run_needs_as_many_training_records_as_a_step_takes():
    config_with(4)
    with pytest.raises(ConfigError, match=r"mend: .* trained on 4 records .* has 3; set datasets"):
        config_with(3)
    with pytest.raises(ConfigError, match=r"trained on 6 records .*training to 6 or more"):
        config_with(4, groups=3)


def test_the_rule_trains_on_the_training_split_by_the_code_of_the_editor():
    inputs = Inputs(config_with(4), "results", "")
    run = grid.Run("tiny-gptj", "openfacts-zsre", "batch", "mend", "default", 0)
    (need,) = grid.needs_of(inputs.config, run)
    job = SimpleNamespace(
        model="tiny-gptj", dataset="openfacts-zsre", editor="mend", settings=need.name
    )
    found = inputs.training_split(job)
    assert found["requests"] == "<results>/data/openfacts-zsre.training.jsonl"
    for part in ("mend", "training", "network", "base"):
        assert f"workflow/kmebench/editors/hyper/{part}.py" in found["code"]
    assert "workflow/kmebench/editors/hyper/malmen.py" not in found["code"]
    assert inputs.hypernetwork(job) == {"editor": "mend", "settings": need.settings}
    wildcards = SimpleNamespace(**vars(run))
    assert (
        inputs.edit(wildcards)["hypernetwork"] == f"<results>/{need.path(run.model, run.dataset)}"
    )
    assert not any("hyper/training.py" in file for file in inputs.edit(wildcards)["code"])
    assert inputs.hypernetwork_memory(job, 2) == 2 * inputs.hypernetwork_memory(job, 1)


def test_training_asks_for_the_network_its_gradient_and_both_moments():
    """GPT-J: two shapes of 2 blocks of maps [20480, 1920] and back, four times in float32."""
    shape = {"layers": 28, "width": 4096, "ffn_width": 16384, "parameters": 6.05e9}
    config = read_checked_config(Path("config.yaml"))
    config["models"] = {"m": {"shape": shape, "dtype": "bfloat16"}}
    weights = 2 * 4 * 20480 * 1920
    assert weights == pytest.approx(2 * 157e6, rel=0.01)
    needs = [needed("mend"), needed("mend", rank=960)]
    more, less = (memory.asked_by_network(config, "m", need) for need in needs)
    assert more - less == pytest.approx(4 * 4 * weights / 2)


def test_by_hand_the_network_is_of_a_data_set_that_has_records_for_it():
    need = needed("mend")
    datasets = {"a": {"training": 9}, "b": {"training": 10}}
    source = Source("m", Kind.CONFIG, {"datasets": datasets})
    assert method_of(source, "mend", {}).needs == (need,)
    assert workflow_path(source, need) == Path("results", need.path("m", "b"))
    datasets["b"]["training"] = 0
    with pytest.raises(ConfigError, match=r"is trained on 10 records .*datasets\.a\.training"):
        workflow_path(source, need)
    with pytest.raises(
        ConfigError, match=r"needs what it learns on a data set.*name this model under models"
    ):
        method_of(Source("folder", Kind.FOLDER), "mend", {})
