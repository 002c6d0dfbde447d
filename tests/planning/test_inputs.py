"""What rules read and are told, without Snakemake."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmebench.editors import cards
from kmebench.editors.locate.cards import MEMITHparams
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.needs import EVERY_RUN
from kmebench.errors import ConfigError
from kmebench.planning import grid, inputs
from kmebench.planning.config import check_config, read_checked_config
from kmebench.planning.inputs import Inputs
from kmebench.planning.notebooks import NOTEBOOKS, Notebooks
from kmebench.planning.reported import Reported

CONFIG = read_checked_config(Path("config.yaml"), [Path("config/ci.yaml")])


@pytest.fixture
def config():
    return copy.deepcopy(CONFIG)


def wildcards(**names):
    return SimpleNamespace(**names)


def run(method, mode="batch", **other):
    names = {"model": "tiny-gptj", "dataset": "openfacts-zsre", "variant": "default", "seed": "0"}
    return wildcards(method=method, mode=mode, **names | other)


def asked(config, mirror=""):
    return Inputs(config, "results", mirror)


def stages(found):
    """What is not read whatever the editor is."""
    every = ("model", "requests", "original", "neutral", "code")
    return {name: path for name, path in found.items() if name not in every}


def test_a_run_reads_its_own_stages_and_no_others(config):
    found = asked(config).edit(run("memit"))
    assert found["model"] == "<results>/models/tiny-gptj"
    assert found["requests"] == "<results>/data/openfacts-zsre.jsonl"
    assert found["original"] == "<results>/original/tiny-gptj/openfacts-zsre.parquet"
    assert "workflow/kmebench/editors/locate/memit.py" in found["code"]
    assert "workflow/kmebench/editors/locate/pmet.py" not in found["code"]
    assert set(stages(found)) == {"inverse1", "inverse2", "targets"}
    assert found["inverse1"] == "<results>/covariance/tiny-gptj/inverse/1.safetensors"
    consecutive = stages(asked(config).edit(run("memit", "consecutive")))
    assert consecutive.keys() == {"inverse1", "inverse2"}
    alphaedit = stages(asked(config).edit(run("alphaedit", "consecutive")))
    assert alphaedit.keys() == {"spectrum1", "spectrum2"}
    assert stages(asked(config).edit(run("full-c"))) == {}
    assert asked(config).edit(run("full-c", "consecutive")).keys() == set(EVERY_RUN)
    paths = "<results>/trace/tiny-gptj/openfacts-zsre/paths/"
    assert stages(asked(config).edit(run("pac", variant="paths=5"))) == {
        "paths": f"{paths}l2+edit+disjoint+paths=5+negatives=1.safetensors"
    }


def test_what_files_are_called_is_what_their_rules_read_back(config):
    rules = asked(config)
    found = stages(rules.edit(run("pmet")))["targets"]
    target = Path(found).stem.split("/")[-1]
    assert re.fullmatch(inputs.TARGET, target)
    told = rules.targets(wildcards(target=target))
    assert (told["site"], told["layer"], told["steps"]) == ("attention-value", 2, 5)
    selection = "l2+batch=100+kbest+paths=5+negatives=0"
    assert re.fullmatch(inputs.SELECTION, selection)
    assert rules.paths(wildcards(selection=selection)) == {
        "score": "l2",
        "group": 100,
        "selection": "kbest",
        "paths": 5,
        "negatives": 0,
    }


def test_settings_of_a_run_are_complete(config):
    settings = asked(config).settings(run("memit", variant="steps=3"))
    assert settings["editor"] == "memit"
    assert settings["hparams"]["steps"] == 3
    assert settings["hparams"]["layers"] == [1, 2]
    assert settings["hparams"]["moment_weight"] == 15_000.0  # nobody sets it
    assert settings["load"] == {"dtype": "float32", "device": "auto"}


OF_RUNS = {"batch_size": 7, "milestone_sample": 5, "checkpoint_every": 3, "on_failed_edit": "skip"}


@pytest.mark.parametrize(
    ("mode", "decides"),
    [
        ("batch", {"batch_size"}),
        ("consecutive", {"milestone_sample"}),
        ("consecutive+turn=5", {"milestone_sample"}),
        ("breadth_first", set()),
    ],
)
def test_a_key_that_decides_nothing_about_a_run_is_no_parameter_of_it(mode, decides, config):
    before = asked(config).settings(run("full-c", mode))
    changing = {
        key
        for key in OF_RUNS
        if asked(config | {key: OF_RUNS[key]}).settings(run("full-c", mode)) != before
    }
    assert changing == decides


def test_what_is_trained_reads_the_development_split_and_no_reported_record(config):
    rules = asked(config)
    files = stages(rules.edit(run("serac-trained")))
    assert files.keys() == {"encoder", "trained"}
    name = Path(files["trained"]).name.removesuffix(".safetensors")
    assert files["trained"] == f"<results>/trained/tiny-gptj/openfacts-zsre/{name}.safetensors"
    job = wildcards(model="tiny-gptj", dataset="openfacts-zsre", trained=name)
    found = rules.stage(job)
    assert "workflow/kmebench/editors/memory/scope.py" in found.pop("code")
    assert found == {
        "model": "<results>/models/tiny-gptj",
        "requests": "<results>/data/openfacts-zsre.development.jsonl",
        "encoder": "<results>/encoder",
    }
    assert rules.trained(job) == {
        "function": "kmebench.editors.memory.scope:train",
        "settings": {"learning_rate": 3e-5, "steps": 96},
    }
    plain = wildcards(model="tiny-gptj", dataset="openfacts-zsre", trained="kmebench.values.read")
    assert rules.stage(plain).keys() == {"model", "requests", "code"}
    more = rules.training_memory(job, attempt=1) - rules.training_memory(plain, attempt=1)
    assert more >= 4 * 90  # megabytes: weights, gradient and Adam's moments of the encoder


def test_a_changed_default_is_a_changed_parameter_of_its_own_editor_alone(config, monkeypatch):
    rules = asked(config)
    before = {name: rules.settings(run(name)) for name in ("memit", "prune", "rome", "pac")}

    @cards.hyperparameters
    class Changed(MEMITHparams):
        kl_factor: float = 0.5

    changed = replace(cards.card_of("memit"), hparams=Changed)
    monkeypatch.setitem(cards._found(), "memit", changed)
    after = {name: rules.settings(run(name)) for name in before}
    assert [name for name in before if before[name] != after[name]] == ["memit"]


def test_only_what_may_be_left_out_depends_on_how_long_answers_are(config):
    assert asked(config).askable(run("pac")) == {"wild_max_tokens": 0, "on_bad_record": "error"}
    config["datasets"]["openfacts-zsre"]["on_bad_record"] = "skip"
    for dataset in ("openfacts-zsre", "openfacts-zsre.development"):
        found = asked(config).askable(run("pac", dataset=dataset))
        assert found == {"wild_max_tokens": 8, "on_bad_record": "skip"}


def test_models_are_trained_or_fetched_and_ask_for_what_they_take(config):
    rules = asked(config)
    assert rules.trained_models == ["tiny-gptj"]
    assert rules.fetched_models == [name for name in config["models"] if name != "tiny-gptj"]
    config["device"] = "cuda"
    config["models"]["tiny-gptj"]["device"] = "cpu"
    assert rules.devices == {"cpu"}  # no run is of another model
    assert rules.gpus(wildcards(model="smollm2-135m")) == 1
    assert rules.gpus(wildcards(model="tiny-gptj")) == 0
    asked_once = rules.memory(wildcards(model="smollm2-135m"), attempt=1)
    assert rules.memory(wildcards(model="smollm2-135m"), attempt=2) == 2 * asked_once
    weights = 4 * config["models"]["smollm2-135m"]["shape"]["parameters"] / 1e6
    assert weights < asked_once < 3 * weights
    small = {"dataset": "openfacts-zsre", "model": "smollm2-135m"}
    editing = {
        method: rules.editing_memory(run(method, "consecutive", **small), attempt=1)
        for method in ("none", "pac", "memit", "full-c")
    }
    assert asked_once == editing["none"] < editing["pac"] < editing["memit"] < editing["full-c"]


def test_the_covariance_keeps_the_layers_that_other_configs_read(config, tmp_path):
    rules, model = Inputs(config, str(tmp_path), ""), wildcards(model="tiny-gptj")
    assert rules.covariance_layers(model) == [1, 2]
    path = tmp_path / "covariance/tiny-gptj.safetensors"
    for held, asked_for in (([1], [1, 2]), ([0, 2], [0, 1, 2]), ([0, 1, 2, 3], [0, 1, 2, 3])):
        write_covariance(path, {layer: torch.eye(2) for layer in held}, 8, {"source": "self"})
        assert rules.covariance_layers(model) == asked_for


def test_names_of_hyperparameters_have_digits_and_their_runs_match_the_rule(config, monkeypatch):
    @cards.hyperparameters
    class Digits:
        beta1: float = 0.9
        L2_weight: float = 0.0

    numbered = replace(cards.card_of("none"), hparams=Digits)
    monkeypatch.setitem(cards._found(), "none", numbered)
    spec = config["experiments"]["table2"]
    spec |= {"methods": ["none"], "sweep": {"beta1": [0.5], "L2_weight": [0.1]}}
    side = {"mode": "consecutive", "method": "none"}
    pairs = {"p": {"question": "?", "a": side | {"hparams": {"beta1": 0.5}}, "b": side}}
    config["comparisons"]["digits"] = {"title": "t", "protocol": "token", "pairs": pairs}
    config["comparisons"]["digits"] |= {key: spec[key] for key in ("models", "datasets")}
    check_config(config)
    variants = {run.variant for run in grid.all_runs(config) if run.method == "none"}
    assert {"L2_weight=0.1+beta1=0.5", "beta1=0.5", "default"} <= variants
    assert all(re.fullmatch(inputs.VARIANT, variant) for variant in variants)
    pairs["p"]["a"]["hparams"] = {"beta-1": 0.5}
    with pytest.raises(ConfigError, match=r"hparams: 'beta-1' .*letters, digits and underscores"):
        check_config(config)


def test_a_users_data_file_is_known_by_its_content_unless_the_config_pins_it(config, tmp_path):
    source = {"source": "file", "filenames": ["mine.json"]}
    config["datasets"]["mine"] = {"source": source, "schema": "mend", "n": 1}
    (tmp_path / "mine.json").write_text("[]")
    rules = Inputs(config, str(tmp_path / "results"), str(tmp_path))
    assert rules.users_data_file("mine") == tmp_path / "mine.json"
    first = rules.data_content(wildcards(data="mine"))
    (tmp_path / "mine.json").write_text("[1]")
    assert first != rules.data_content(wildcards(data="mine"))
    source["sha256"] = "0" * 64
    assert rules.data_content(wildcards(data="mine")) is None


def test_a_development_split_has_a_label_and_no_name_in_the_paper(config):
    config["datasets"]["openfacts-zsre"]["paper_name"] = "ZsRE"
    reported = Reported(config, "results")
    split = reported.labels("datasets", "openfacts-zsre.development")
    assert split == {"label": "OpenFacts (ZsRE form), development split", "paper_name": None}
    assert reported.labels("datasets", "openfacts-zsre")["paper_name"] == "ZsRE"


def test_figures_read_what_their_kind_shows(config):
    reported = Reported(config, "results")

    def files(name):
        return reported.figure_files(wildcards(figure=name))

    assert files("figure5-paths") == ["<results>/metrics/ablation-paths.parquet"]
    assert all(path.endswith("/timing.json") for path in files("figure3-time"))
    nodes = files("figure4-nodes")  # only one editor of table 2 reads paths, on two data sets
    assert len(nodes) == 2
    assert nodes[0].endswith("/nodes/l2+edit+disjoint+paths=15+negatives=1.parquet")
    values = [r["value"] for r in reported.figure(wildcards(figure="figure5-paths"))["runs"]]
    assert values == [5, 15]


def test_every_notebook_is_told_something_and_reads_files(config):
    notebooks = Notebooks(config, "elsewhere")
    assert {f"{name}.ipynb" for name in NOTEBOOKS} == {
        path.name for path in Path("notebooks").glob("*.ipynb")
    }
    for name in NOTEBOOKS:
        assert notebooks.parameters(wildcards(notebook=name))["results"] == "elsewhere"
        found = notebooks.inputs(wildcards(notebook=name))
        assert found["files"]
        assert f"notebooks/{name}.ipynb" in found["code"]


def test_ends_are_of_consecutive_runs_on_one_model_and_data_set(config):
    spec = config["experiments"]["table2"]
    told, files = Notebooks(config, "results").ends_of_runs()
    assert (told["model"], told["dataset"]) == (spec["models"][0], spec["datasets"][0])
    assert sorted(told["runs"]) == sorted(spec["methods"])
    for folder in told["runs"].values():
        assert f"/{told['dataset']}/consecutive/" in folder
        assert f"<results>/{folder}/health.json" in files
    config["seed"] = 3
    assert told["runs"].keys() == Notebooks(config, "results").ends_of_runs()[0]["runs"].keys()
    spec["mode"] = "batch"  # nothing ends in a batch
    assert Notebooks(config, "results").ends_of_runs()[0]["runs"] == {}


def test_an_unknown_notebook_is_refused(config):
    config["notebooks"] = ["03_paper_tabels"]
    with pytest.raises(ConfigError, match="did you mean '03_paper_tables'"):
        check_config(config)


def test_a_rule_takes_turns_for_a_mode(config):
    told = asked(config).settings(run("full-c", "consecutive+turn=5"))
    assert told["mode"] == "consecutive+turn=5"
    assert told | {"mode": "consecutive"} == asked(config).settings(run("full-c", "consecutive"))
    for mode in (*grid.MODES, "consecutive+turn=5"):
        assert re.fullmatch(inputs.MODE, mode)
    assert not re.fullmatch(inputs.MODE, "batch+turn=5")
