"""From the config to runs."""

import copy
from pathlib import Path

import pytest
import yaml

from kmebench.editors.cards import card_of, plain, registered
from kmebench.editors.needs import Paths, Targets
from kmebench.errors import ConfigError
from kmebench.planning import grid
from kmebench.planning.config import SCHEMA, check_config, read_config

CONFIG = read_config(Path("config.yaml"))


@pytest.fixture
def config():
    config = copy.deepcopy(CONFIG)
    config["experiments"] = {
        "main": {
            "mode": "consecutive",
            "models": ["tiny-gptj"],
            "datasets": ["openfacts-zsre"],
            "methods": ["full-c", "pac"],
        },
        "sweep": {
            "mode": "consecutive",
            "models": ["tiny-gptj"],
            "datasets": ["openfacts-zsre"],
            "methods": ["pac"],
            "sweep": {"paths": [5, 15], "lambda": [0.1, 0.0]},
        },
    }
    config["experiments"]["tuning"] = {
        "mode": "batch",
        "models": ["tiny-gptj"],
        "datasets": ["openfacts-zsre.development"],
        "methods": ["pac"],
    }
    config["models"]["tiny-gptj"]["hparams"] = {"pac": {"learning_rate": 2e-3}}
    config["tables"], config["figures"] = {}, {}
    check_config(config)
    return config


def defaults(editor):
    return plain(card_of(editor).hparams())


def test_a_swept_value_equal_to_the_configured_one_is_the_default_run(config):
    variants = [run.variant for run in grid.runs_of(config, "sweep")]
    assert variants == ["paths=5", "lambda=0.0+paths=5", "default", "lambda=0.0"]  # the editor's
    config["methods"]["pac"]["hparams"] = {"lambda": 0.0}
    variants = [run.variant for run in grid.runs_of(config, "sweep")]
    assert variants == ["lambda=0.1+paths=5", "paths=5", "lambda=0.1", "default"]
    shared = set(grid.runs_of(config, "main")) & set(grid.runs_of(config, "sweep"))
    assert len(shared) == 1
    assert len(grid.all_runs(config)) == 6


def test_a_development_split_is_a_data_set_of_its_own_size(config):
    (run,) = grid.runs_of(config, "tuning")
    assert run.folder() == "runs/tiny-gptj/openfacts-zsre.development/batch/pac/default/seed0"
    sizes = grid.datasets(config)
    assert sizes["openfacts-zsre.development"] == 50
    assert sizes["openfacts-zsre"] == CONFIG["datasets"]["openfacts-zsre"]["n"]
    config["datasets"]["openfacts-zsre"]["segments"] = [[0, 5], [10, 30]]
    assert grid.datasets(config)["openfacts-zsre"] == 25


def test_adopting_tuned_values_does_not_rename_the_search_they_come_from(config):
    config["experiments"]["tuning"]["sweep"] = {"learning_rate": [1e-3, 2e-3]}
    before = [run.variant for run in grid.runs_of(config, "tuning")]
    assert before == ["learning_rate=0.001", "learning_rate=0.002"]
    config["models"]["tiny-gptj"]["hparams"]["pac"]["learning_rate"] = 1e-3
    assert [run.variant for run in grid.runs_of(config, "tuning")] == before


def test_a_variant_reads_back_as_what_was_swept(config):
    run = grid.runs_of(config, "sweep")[1]
    expected = {"learning_rate": 2e-3, "paths": 5, "lambda": 0.0}
    assert grid.hparams_of(config, run) == defaults("pac") | expected
    assert list(grid.hparams_of(config, run)) == sorted(defaults("pac"))
    assert grid.parse_variant("score=l2+norm_constraint=None+steps=3") == {
        "score": "l2",
        "norm_constraint": None,
        "steps": 3,
    }


def test_the_models_values_go_before_the_methods(config):
    config["methods"]["pac"]["hparams"] = {"learning_rate": 1.0, "steps": 7}
    run = grid.runs_of(config, "main")[1]
    expected = {"learning_rate": 2e-3, "steps": 7}
    assert grid.hparams_of(config, run) == defaults("pac") | expected


def test_values_of_the_runs_mode_go_before_general_ones_and_the_models_before_the_methods(config):
    method = {"steps": 7, "batch": {"steps": 8, "learning_rate": 1.0, "tolerance": 0.2}}
    config["methods"]["pac"]["hparams"] = method
    config["models"]["tiny-gptj"]["hparams"]["pac"]["batch"] = {"tolerance": 0.1}
    (tuning,) = grid.runs_of(config, "tuning")
    expected = defaults("pac") | {"learning_rate": 2e-3, "steps": 8, "tolerance": 0.1}
    assert (tuning.mode, grid.hparams_of(config, tuning)) == ("batch", expected)
    consecutive = grid.runs_of(config, "main")[1]
    expected = defaults("pac") | {"learning_rate": 2e-3, "steps": 7}
    assert grid.hparams_of(config, consecutive) == expected
    config["methods"]["pac"]["hparams"]["batch"] = None
    check_config(config)
    assert grid.hparams_of(config, tuning) == expected | {"tolerance": 0.1}


def test_a_swept_value_equal_to_that_of_the_mode_is_the_default_run(config):
    config["methods"]["pac"]["hparams"] = {"consecutive": {"paths": 5}, "batch": {"paths": 3}}
    variants = [run.variant for run in grid.runs_of(config, "sweep")]
    assert variants == ["default", "lambda=0.0", "paths=15", "lambda=0.0+paths=15"]


def paths_of(config, run):
    return grid.needed(config, run, Paths)


def test_lambda_does_not_name_a_path_file_but_paths_do(config):
    needs = [paths_of(config, run) for run in grid.runs_of(config, "sweep")]
    assert len({need.name for need in needs}) == 2
    assert needs[0].name == "l2+edit+disjoint+paths=5+negatives=1"
    assert Paths.parse(needs[0].name) == needs[0] == Paths("l2", 1, "disjoint", 5, 1)


def test_scope_batch_means_the_batch_only_where_there_is_one(config):
    config["methods"]["pac"]["hparams"] = {"scope": "batch"}
    one_by_one = grid.runs_of(config, "main")[1]
    assert "+edit+" in paths_of(config, one_by_one).name
    config["experiments"]["main"]["mode"] = "batch"
    batched = paths_of(config, grid.runs_of(config, "main")[1])
    assert Paths.parse(batched.name).group == config["batch_size"] == 100


def test_only_an_editor_that_traces_the_original_needs_paths(config):
    full_c, pac = grid.runs_of(config, "main")
    assert grid.needs_of(config, full_c) == ()
    assert paths_of(config, pac)
    config["methods"]["pac"]["hparams"] = {"trace_on": "current"}
    assert grid.needs_of(config, pac) == ()


def test_a_comparison_makes_its_own_runs_and_shares_them(config):
    side = {"mode": "consecutive", "method": "pac"}
    config["comparisons"] = {
        "audit": {
            "title": "x",
            "protocol": "token",
            "models": ["tiny-gptj"],
            "datasets": ["openfacts-zsre"],
            "pairs": {
                "paths": {"question": "?", "a": side | {"hparams": {"paths": 5}}, "b": side},
                "same": {"question": "?", "a": side | {"hparams": {"paths": 15}}, "b": side},
            },
        }
    }
    check_config(config)
    paths, same = grid.pairs_of(config, "audit")
    assert [run.variant for run in paths[1:]] == ["paths=5", "default"]
    assert same[1] == same[2] == paths[2]
    assert paths[2] in grid.runs_of(config, "main")  # shared with an experiment
    assert paths[1] in grid.all_runs(config)
    config["comparisons"]["audit"]["pairs"]["paths"]["a"]["method"] = "pca"
    with pytest.raises(ConfigError, match=r"comparisons.audit.pairs.paths names 'pca'"):
        check_config(config)


def set_at(config, path, value):
    *parents, last = path.split("/")
    for key in parents:
        config = config[key]
    config[last] = value


BAD = {
    "experiments/main/models": (["tiny-gtpj"], "names 'tiny-gtpj'.*did you mean 'tiny-gptj'"),
    "experiments/main/mode": ("batched", "experiments.main.mode"),
    "experiments/main/datasets": ([], "experiments.main.datasets"),
    "methods/pac/editor": ("pca", "no editor 'pca'.*did you mean 'pac'"),
    "seeed": (1, "seeed"),
    "datasets/openfacts-zsre/n": ("ten", "datasets.openfacts-zsre.n"),
    "models/tiny-gptj/dtype": ("float31", "models.tiny-gptj.dtype"),
    "models/Tiny": ({"source": {"source": "tiny"}}, "Tiny"),
    "datasets/mine.development": (
        {"source": {"source": "openfacts", "kind": "zsre"}, "schema": "mend", "n": 1},
        "mine.development.*not ending like",
    ),
    "datasets/openfacts-zsre/development": (0, "names 'openfacts-zsre.development'"),
    "batch_size": (0, "batch_size.*Requests edited at once"),
    "tables/t": (
        {"title": "x", "experiment": "mian", "protocol": "token"},
        "tables.t.experiment names 'mian'.*did you mean 'main'",
    ),
}


@pytest.mark.parametrize("path", BAD)
def test_a_bad_config_is_one_sentence_that_names_the_key(path, config):
    value, complaint = BAD[path]
    set_at(config, path, value)
    with pytest.raises(ConfigError, match=complaint) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


def test_every_config_of_the_repository_is_valid():
    real = ["real"]
    folder = Path("config")
    below = dict.fromkeys(("single", "sizes", "npac-ablations", "full-length"), real)
    for kind in ("searches", "reference"):
        below |= {f"{kind}/{path.stem}": real for path in (folder / kind).glob("*.yaml")}
    del below["searches/tiny"]
    below |= {"ci-real": ["ci"], "reference/full-length": ["real", "full-length"]}
    every = [path for path in folder.rglob("*.yaml") if path.parent.name != "tuned"]
    assert set(below) < {str(path.relative_to(folder).with_suffix("")) for path in every}
    for path in every:
        config = copy.deepcopy(CONFIG)
        for name in below.get(str(path.relative_to(folder).with_suffix("")), ()):
            under = (folder / f"{name}.yaml").read_text(encoding="utf-8")
            merge(config, yaml.safe_load(under))
        merge(config, yaml.safe_load(path.read_text(encoding="utf-8")))
        check_config(config)
        assert grid.all_runs(config)
        assert "distinct runs" in grid.describe(config)


def merge(config, overlay):
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


def test_every_key_of_the_schema_is_described():
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    for name, spec in schema["properties"].items():
        assert spec.get("description"), name
        assert spec.get("additionalProperties", False) is not True


def test_a_default_is_its_editors_own():
    methods = {"pac": {}, "mine": {"editor": "pac"}, "pac-released": {}, "memit": {}, "full-c": {}}
    config = {"methods": methods, "models": {"m": {"hparams": {"mine": {"lambda": 0.3}}}}}

    def name(method, **values):
        return grid.variant_name(config, "m", method, "batch", values)

    assert name("pac", score="l2", paths=15) == name("pac", **{"lambda": 0.1}) == "default"
    assert name("mine", **{"lambda": 0.3}) == "default"
    assert name("mine", **{"lambda": 0.1}) == "lambda=0.1"
    assert name("pac-released", epochs=12, shared_state=True) == "default"
    assert name("memit", steps=25, layers=[4, 5, 6, 7, 8]) == "default"
    assert name("memit", steps=20, moment_weight=5) == "moment_weight=5.0+steps=20"
    assert name("full-c", steps=25, layers=None) == "default"


def test_values_are_compared_as_the_editor_takes_them():
    config = {"methods": {"full-c": {"hparams": {"learning_rate": "1e-4"}}}, "models": {"m": {}}}

    def name(value):
        return grid.variant_name(config, "m", "full-c", "batch", {"learning_rate": value})

    assert name(0.0001) == name("1e-4") == name("1.0e-04") == "default"
    assert name("2e-4") == name(2e-4) == "learning_rate=0.0002"


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ({"paths": 20, "negatives": 0}, {"negatives": 0, "paths": 20}, "negatives=0+paths=20"),
        ({"lambda": 1}, {"lambda": 1.0}, "lambda=1.0"),
        ({"contrast": "1.0"}, {"lambda": 1}, "lambda=1.0"),
        ({"learning_rate": "1e-3"}, {"learning_rate": 0.001}, "learning_rate=0.001"),
        ({"paths": "20"}, {"paths": 20.0}, "paths=20"),
    ],
)
@pytest.mark.parametrize("split", ["openfacts-zsre", "openfacts-zsre.development"])
def test_a_run_has_one_name_however_a_config_writes_it(one, other, name, split, config):
    spec = config["experiments"]["sweep"] | {"datasets": [split]}
    for written in (one, other):
        config["experiments"]["sweep"] = spec | {"sweep": {k: [v] for k, v in written.items()}}
        assert [run.variant for run in grid.runs_of(config, "sweep")] == [name]


def test_two_spellings_of_a_swept_value_are_one_run(config):
    config["experiments"]["sweep"]["sweep"] = {"learning_rate": ["1e-3", 0.001, 1e-2]}
    variants = [run.variant for run in grid.runs_of(config, "sweep")]
    assert variants == ["learning_rate=0.001", "learning_rate=0.01"]


def test_reference_results_lie_where_their_configs_look_for_them(config):
    """A development split spells every value, and none is dropped as the configured one."""
    spec = config["experiments"]["sweep"] | {"datasets": ["openfacts-zsre.development"]}
    found = set()
    for path in Path("reference").glob("*/runs/*/*/*/*/*/seed*"):
        method, variant = path.parts[-3:-1]
        values = grid.parse_variant(variant)
        swept = {"methods": [method], "sweep": {key: [value] for key, value in values.items()}}
        config["experiments"]["sweep"] = spec | swept
        (run,) = grid.runs_of(config, "sweep")
        assert run.variant == variant
        found.add(variant)
    assert {"default", "lambda=0.0", "ridge=10.0", "second_step=momentum"} <= found


def test_batches_share_targets_where_layer_and_loss_agree():
    located = [name for name, card in registered().items() if card.family == "locate"]
    methods = {name: {} for name in located} | {"pac": {}}
    config = {
        "batch_size": 100,
        "methods": methods,
        "models": {"m": {"hparams": {"rect": {"learning_rate": 0.1}}}},
    }

    def target(method, mode="batch", variant="default"):
        run = grid.Run("m", "d", mode, method, variant, 0)
        need = grid.needed(config, run, Targets)
        return need and need.name

    memit = target("memit")
    assert memit == (
        "site=layer+layer=8+steps=25+learning_rate=0.5+kl_factor=0.0625+weight_decay=0.001+"
        "clamp_factor=4.0+kl_position=subject_last+stop_loss=0.05"
    )
    assert Targets.parse(memit).layer == 8
    assert target("memit", variant="clamp_factor=4") == memit
    assert target("alphaedit") == target("prune") == memit
    assert target("prune", variant="base=2.0") == memit
    others = {
        memit,
        target("pmet"),
        target("emmet"),
        target("rect"),
        target("memit", variant="steps=3"),
    }
    assert len(others) == 5
    assert Targets.parse(target("pmet")).site == "attention-value"
    assert not any(target(m, mode) for m in methods for mode in ("consecutive", "breadth_first"))
    assert not any(map(target, ("rome", "r-rome", "pac")))


def covariance_config(methods, hparams, *, mode="batch", sweep=None):
    """A model of few layers, with one experiment, among methods that would edit others."""
    others = {"rome": {}, "alphaedit": {}, "memit": {"hparams": {"layers": [2, 3]}}, "pac": {}}
    return {
        "seed": 0,
        "batch_size": 100,
        "methods": others | {"emmet": {}},
        "datasets": {"d": {"n": 1}},
        "models": {"small": {"hparams": hparams}, "other": {}},
        "experiments": {
            "e": {
                "mode": mode,
                "models": ["small"],
                "datasets": ["d"],
                "methods": methods,
                "sweep": sweep or {},
            },
            "elsewhere": {
                "mode": "batch",
                "models": ["other"],
                "datasets": ["d"],
                "methods": ["rome"],
            },
        },
    }


@pytest.mark.parametrize(
    ("methods", "hparams", "grid_values", "layers"),
    [
        (["emmet"], {"emmet": {"layers": [1]}}, {}, [1]),
        (["emmet", "memit"], {"emmet": {"layers": [1]}}, {}, [1, 2, 3]),
        (["memit"], {}, {}, [2, 3]),  # the method's own
        (["rome"], {}, {}, [5]),  # the editor's
        (["rome"], {"rome": {"layer": 1}}, {"sweep": {"layer": [0, 2]}}, [0, 2]),
        (["rome"], {"rome": {"batch": {"layer": 1}, "consecutive": {"layer": 2}}}, {}, [1]),
        (["rome"], {"rome": {"batch": {"layer": 1}, "layer": 2}}, {"mode": "consecutive"}, [2]),
        (["rome"], {"rome": {"second_moment": False}}, {}, []),
        (["pac"], {}, {}, []),
    ],
)
def test_only_what_runs_of_a_model_edit_asks_for_its_covariance(
    methods, hparams, grid_values, layers
):
    config = covariance_config(methods, hparams, **grid_values)
    assert grid.measured_layers(config, "small") == layers
    assert grid.measured_layers(config, "other") == [5]


def test_a_comparison_asks_for_its_covariance_too():
    config = covariance_config(["pac"], {})
    sides = {"a": {"method": "rome", "mode": "batch", "hparams": {"layer": 1}}}
    sides["b"] = {"method": "memit", "mode": "batch"}
    pairs = {"p": {"question": "?", **sides}}
    config["comparisons"] = {"c": {"models": ["small"], "datasets": ["d"], "pairs": pairs}}
    assert grid.measured_layers(config, "small") == [1, 2, 3]


@pytest.mark.parametrize(
    "value", [[[1], [2]], {"a": 1}, "True", "nan", "1_0", "a,b", "a+b", "../up", "$(x)", "a b"]
)
def test_what_cannot_be_part_of_a_files_name_is_refused(value):
    with pytest.raises(ConfigError, match=r"layers: .* cannot be part of a file's name"):
        grid.variant_name(
            {"methods": {"pac": {}}, "models": {"m": {}}}, "m", "pac", "batch", {"layers": value}
        )


def test_turns_have_folders_of_their_own_and_the_values_of_consecutive_editing(config):
    config["models"]["tiny-gptj"]["hparams"]["pac"] = {
        "learning_rate": 2e-3,
        "consecutive": {"steps": 7},
        "batch": {"steps": 9},
    }
    one = grid.runs_of(config, "main")
    config["experiments"]["main"]["turn"] = 1
    assert grid.runs_of(config, "main") == one
    config["experiments"]["turns"] = config["experiments"]["main"] | {"turn": 50}
    check_config(config)
    run = grid.runs_of(config, "turns")[1]
    assert run.folder() == ("runs/tiny-gptj/openfacts-zsre/consecutive+turn=50/pac/default/seed0")
    assert one[1].folder() == "runs/tiny-gptj/openfacts-zsre/consecutive/pac/default/seed0"
    assert (run.pipeline, run.turn) == ("consecutive", 50)
    assert grid.hparams_of(config, run)["steps"] == 7
    assert "turns: 2 runs (consecutive in turns of 50; 1 models" in grid.describe(config)
    assert {one[1], run} <= set(grid.all_runs(config))


def test_sides_of_a_comparison_have_turns(config):
    side = {"mode": "consecutive", "method": "pac"}
    config["comparisons"] = {
        "c": {
            "title": "t",
            "protocol": "token",
            "models": ["tiny-gptj"],
            "datasets": ["openfacts-zsre"],
            "pairs": {"p": {"question": "q", "a": side, "b": side | {"turn": 2}}},
        }
    }
    check_config(config)
    ((_, a, b),) = grid.pairs_of(config, "c")
    assert (a.mode, b.mode) == ("consecutive", "consecutive+turn=2")


def test_a_batch_has_no_turns(config):
    config["experiments"]["tuning"]["turn"] = 2
    with pytest.raises(ConfigError, match=r"experiments\.tuning\.turn groups .*'batch'; set mode"):
        check_config(config)


@pytest.mark.parametrize("turn", [0, "ten", 2.5])
def test_a_turn_that_is_no_number_of_requests_is_one_sentence(turn, config):
    config["experiments"]["main"]["turn"] = turn
    with pytest.raises(
        ConfigError, match=r"wrong at experiments\.main\.turn: .*hands over"
    ) as told:
        check_config(config)
    assert "\n" not in str(told.value)


def test_paths_of_a_whole_turn_are_not_cached(config):
    config["methods"]["pac"]["hparams"] = {"scope": "batch"}
    config["experiments"]["main"]["turn"] = 2
    with pytest.raises(ConfigError, match="not of turns; set scope: edit, or trace_on: current"):
        check_config(config)
    config["methods"]["pac"]["hparams"] = {"scope": "batch", "trace_on": "current"}
    check_config(config)
