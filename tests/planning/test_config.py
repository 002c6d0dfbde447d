"""A wrong config is refused before anything runs, in one sentence that names file or key."""

import copy
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from snakemake.utils import update_config

from kmebench.errors import ConfigError
from kmebench.planning import grid
from kmebench.planning.config import SCHEMA, check_config, read_checked_config, read_config
from kmebench.planning.overlays import read_overlay


def checked(overlays=(), **figure):
    config = read_config(Path("config.yaml"), overlays)
    config["figures"] = {"mine": {"title": "Mine"} | figure}
    check_config(config)


@pytest.mark.parametrize(
    ("figure", "complaint"),
    [
        ({"kind": "sweep", "experiment": "table2"}, "figures.mine"),
        ({"kind": "time"}, "figures.mine"),
        ({"kind": "paper", "experiment": "table2"}, "figures.mine"),
        ({"kind": "overview", "experiment": "table2"}, "figures.mine"),
        ({"kind": "cost", "experiments": ["table3"]}, "figures.mine.experiments"),
        ({"kind": "pie", "experiment": "table2"}, "figures.mine"),
        ({"kind": "time", "experiment": "table3"}, "did you mean 'table"),
        ({"kind": "paper", "tables": ["table3"]}, "did you mean 'table"),
        (
            {"kind": "sweep", "experiment": "ablation-paths", "parameter": "path"},
            "did you mean 'paths'",
        ),
        ({"kind": "edits", "experiment": "table1"}, "edits in mode 'batch'"),
    ],
)
def test_a_figure_that_would_show_nothing_is_refused(figure, complaint):
    with pytest.raises(ConfigError, match=complaint):
        checked(**figure)


def test_a_sweep_may_be_over_seeds_and_figures_may_share_an_experiment():
    real = [Path("config/real.yaml")]
    checked(real, kind="sweep", experiment="edit-order", parameter="seed")
    checked(kind="paper", tables=["table1", "table2"])


ABLATIONS = ("ablation-paths", "ablation-lambda", "ablation-negatives")
ONLY = {
    "by their names": {"only_experiments": ["table2"]},
    "one by one": {"experiments": dict.fromkeys(("table1", *ABLATIONS))},
}


@pytest.mark.parametrize("overlay", ONLY.values(), ids=ONLY)
def test_what_shows_nothing_but_experiments_left_out_is_left_out(overlay, tmp_path):
    (tmp_path / "only.yaml").write_text(yaml.safe_dump(overlay))
    config = read_checked_config(Path("config.yaml"), [tmp_path / "only.yaml"])
    assert list(config["experiments"]) == ["table2"]
    assert list(config["tables"]) == ["table2"]
    assert config["figures"]["overview"]["experiments"] == ["table2"]
    assert "figure3-time" in config["figures"]
    assert "figure5-paths" not in config["figures"]


@pytest.mark.parametrize(
    ("methods", "shown"), [(["memit"], True), (["pac"], True), (["none"], False)]
)
def test_a_figure_that_has_nothing_to_show_is_left_out(methods, shown):
    config = read_config(Path("config.yaml"))
    config["experiments"]["table2"]["methods"] = methods
    check_config(config)
    assert ("figure3-time" in config["figures"]) == shown
    assert ("figure4-nodes" in config["figures"]) == (methods == ["pac"])
    assert "edits" in config["figures"]


def test_figures_of_tables_go_with_the_last_of_them():
    config = read_config(Path("config.yaml"))
    config["figures"] = {"mine": {"title": "Sizes", "kind": "paper", "tables": ["table1"]}}
    config["experiments"]["table1"] = None
    check_config(config)
    assert not config["figures"]


def test_the_only_experiments_must_be_there():
    config = read_config(Path("config.yaml"))
    config["only_experiments"] = ["tabel2"]
    with pytest.raises(
        ConfigError, match=r"only_experiments names 'tabel2'.*did you mean 'table2'"
    ):
        check_config(config)


def test_an_overlay_takes_entries_out_by_null(tmp_path):
    overlay = tmp_path / "fewer.yaml"
    overlay.write_text("figures: {negatives: null}\ntables: {ablation-paths: null}\n")
    config = read_checked_config(Path("config.yaml"), [overlay])
    assert "negatives" not in config["figures"]
    assert "ablation-paths" not in config["tables"]
    assert {"ablation-negatives", "ablation-paths"} <= set(config["experiments"])


def test_a_method_may_be_its_name_alone():
    config = read_config(Path("config.yaml"))
    config["methods"]["memit"] = None
    check_config(config)
    assert config["methods"]["memit"] == {}


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("label: café".encode("latin-1"), r"is not UTF-8 text \(byte 10\); save it as UTF-8"),
        ("seed: 1".encode("utf-16"), "is not UTF-8 text"),
        (b"- datasets\n- models\n", "holds a list at its top; it must hold keys"),
        (b"just words", "holds a text at its top"),
        (b"3", "holds a value at its top"),
        (b"", "holds nothing at its top"),
        (b"# all taken out\n", "holds nothing at its top"),
        (b"models:\n\tx: 1\n", "line 2, column 1: .*; indent by blanks, not by tabs"),
        (b"models: {x: [1\n", "is not YAML at line 2, column 1: expected"),
        (b"seed: 1\nmodels: {}\nseed: 2\n", "line 3, column 1: the key 'seed' stands twice"),
        (b"a: {b: 1, c: 2, b: 3}\n", "the key 'b' stands twice; take one out"),
        (b"revision: 2024-13-45\n", "column 11: this looks like a date .*put it in quotes"),
        (b"x: &x {y: *x}\n", "within itself"),
        (b"[" * 4000, "nests too deeply"),
        (b"x: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"---\na: 1\n---\nb: 1\n", "expected a single document"),
        (b"x: \x01\n", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(written, complaint, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_bytes(written)
    with pytest.raises(ConfigError, match=f"overlay.yaml .*{complaint}") as caught:
        read_config(Path("config.yaml"), [overlay])
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is a folder; name a config file in it"):
        read_overlay(tmp_path)
    with pytest.raises(ConfigError, match="There is no config"):
        read_overlay(tmp_path / "none.yaml")

    def refuse(path, **_):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read: Permission denied"):
        read_overlay(tmp_path / "mine.yaml")


def test_an_overlay_may_share_parts_and_begin_with_a_byte_order_mark(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a, x: 3}\n"
    overlay.write_text(text, encoding="utf-8-sig")
    assert read_overlay(overlay) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 3}}


def model(**source):
    return {"models": {"mine": {"source": source}}}


REPO = r"models\.mine\.source\.repo: .* is not of the right form .*owner/name.*path: "
WRONG = {
    "a path": (model(source="hub", repo="./models/x", revision="main"), REPO),
    "another": (model(source="hub", repo="/models/x", revision="main"), REPO),
    "a home": (model(source="hub", repo="~/x", revision="main"), REPO),
    "an address": (model(source="hub", repo="https://h.org/a/b", revision="main"), REPO),
    "three parts": (model(source="hub", repo="a/b/c", revision="main"), REPO),
    "a clone": (model(source="hub", repo="a/b.git", revision="main"), REPO),
    "no revision": (model(source="hub", repo="a/b"), "mine.source: the key 'revision' is missing"),
    "digits": (model(source="hub", repo="a/b", revision=1234567), "quote one of digits alone"),
    "a source": (model(source="hf", repo="a/b"), "source.source: 'hf' is not one of '"),
    "no source": (model(repo="a/b"), "the key 'source' is missing"),
    "a text": ({"models": {"mine": {"source": "hub"}}}, "'hub' is not keys with values"),
    "a wheel": (
        model(source="wheel", requirement="-r x", sha256="0" * 64, member="x"),
        "requirement: '-r x' is not of the right form .*name==version",
    ),
    "wheels": (
        model(source="wheels", requirements="x-part1==1", sha256="0" * 64, member="*/data/*"),
        r"requirements: 'x-part1==1' is not of the right form .*name\{1\.\.22\}==version",
    ),
    "terms": (
        model(source="hub", repo="a/b", revision="main", terms="ask them"),
        "terms: 'ask them' is not of the right form",
    ),
    "capitals": (
        {"models": {"Qwen2.5-0.5B": {"source": {"source": "tiny"}}}},
        "models: 'Qwen2.5-0.5B' is not .* did you mean 'qwen2.5-0.5b'",
    ),
    "a number": ({"models": {1: {}}}, "models: the key 1 is no text; quote it"),
    "a line break": ({"models": {"a\nb": {1: 2}}}, r"at models\.a b: the key 1 is no text"),
    "a yes": ({"experiments": {"table1": {True: 1}}}, "table1: the key True is no text"),
    "a key": ({"sead": 1}, "top level: there is no key 'sead'; did you mean 'seed'"),
    "an old key": ({"moments": {}}, "the key 'moments' is called 'covariance' now; rename it"),
    "a deep key": ({"models": {"tiny-gptj": {"Dtype": "float32"}}}, "did you mean 'dtype'"),
    "a type": (
        {"models": {"tiny-gptj": {"dtype": "fp16"}}},
        "'fp16' is not one of .*'bfloat16', 'float16'",
    ),
    "a mode": ({"experiments": {"table1": {"mode": "Batch"}}}, "did you mean 'batch'"),
    "a method": ({"experiments": {"table1": {"methods": ["PAC"]}}}, "did you mean 'pac'"),
    "the field's word": (
        {"experiments": {"table1": {"mode": "sequential"}}},
        "'sequential' is not one of .* did you mean 'consecutive'",
    ),
    "too small": ({"threads": 0}, "threads: 0 is too small, the least is 1"),
    "a number as a text": ({"threads": "2"}, "threads: '2' is not a whole number"),
    "an empty list": ({"only_models": []}, "only_models: .* is too short, the least is 1"),
    "a device": ({"device": "CPU"}, "did you mean 'cpu'"),
    "an editor": ({"methods": {"mine": {"editor": "my editor:x"}}}, "package.module:CARD"),
    "a text's place": (
        {"covariance": {"text": {"source": "file"}}},
        "text: the key 'path' is missing",
    ),
    "a data set": (
        {
            "datasets": {
                "mine": {"source": {"source": "openfacts", "kind": "zsre"}, "schema": "mend"}
            }
        },
        "datasets.mine: the key 'n' is missing",
    ),
    "segments": (
        {"datasets": {"openfacts-zsre": {"segments": [[0, 2], [5, 3]]}}},
        r"openfacts-zsre\.segments: \[5, 3\] ends before it starts",
    ),
    "a data set to leave out": (
        {"datasets": {"openfacts-zsre": {"leave_out": ["openfacts-zsr.development"]}}},
        r"datasets\.openfacts-zsre\.leave_out names 'openfacts-zsr'.*did you mean",
    ),
    "a data set that leaves itself out": (
        {"datasets": {"openfacts-zsre": {"leave_out": ["openfacts-zsre.development"]}}},
        r"openfacts-zsre\.leave_out: 'openfacts-zsre' itself leaves records out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_one_sentence_that_names_it(case):
    overlay, complaint = WRONG[case]
    config = read_config(Path("config.yaml"))
    update_config(config, overlay)
    with pytest.raises(ConfigError, match=complaint) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "last", "wrong", "key"),
    [
        ("threads: 1", "threads: 0", "last", "threads"),
        ("seeed: 1", "seed: 1", "first", "the top level"),
        ("evaluation: {batch_size: 0}", "evaluation: {}", "first", "evaluation.batch_size"),
        ("seed: 0", "experiments: {mine: {mode: batch}}", "last", "experiments.mine"),
    ],
)
def test_a_wrong_key_is_in_the_last_file_that_has_it(first, last, wrong, key, tmp_path):
    files = {"first": tmp_path / "first.yaml", "last": tmp_path / "last.yaml"}
    files["first"].write_text(first)
    files["last"].write_text(last)
    complaint = f"^{re.escape(str(files[wrong]))} is wrong at {key}: "
    with pytest.raises(ConfigError, match=complaint):
        read_checked_config(Path("config.yaml"), list(files.values()))


@pytest.mark.parametrize(
    "repo", ["gpt2", "Qwen/Qwen2.5-0.5B", "EleutherAI/gpt-j-6b", "a/b_c", "_a/b"]
)
def test_what_the_hub_calls_a_repository_is_taken(repo):
    config = read_config(Path("config.yaml"))
    update_config(config, model(source="hub", repo=repo, revision="refs/pr/1"))
    check_config(config)
    validate_repo_id(repo)


REPOSITORY = Draft202012Validator(
    yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))["$defs"]["repository"]
)


@settings(max_examples=200, deadline=None)
@given(st.text("ab.-_/ \n~:é", max_size=7))
def test_a_repository_is_what_the_hub_takes_for_one(repo):
    taken = REPOSITORY.is_valid(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        assert not taken
    else:
        assert taken


@pytest.mark.parametrize(
    ("method", "hparams", "complaint"),
    [
        ("memit", {"layers": [3, 30]}, r"memit on m: layers is \[3, 30\], .* has 30 layers"),
        ("rome", {"layer": 30}, r"set models\.m\.hparams\.rome\.layer, or mend the shape"),
        ("ultraedit", {"value_layers": [30]}, r"value_layers is \[30\]"),
        ("memit", {"layers": [29]}, None),
        ("full-c", {"layers": None}, None),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused_before_any_job(method, hparams, complaint):
    config = read_config(Path("config.yaml"))
    config["models"] = {"m": config["models"]["smollm2-135m"] | {"hparams": {method: hparams}}}
    spec = config["experiments"]["table1"] | {"methods": [method]}
    config |= {"experiments": {"table1": spec}, "only_models": ["m"], "comparisons": {}}
    config |= {"tables": {"t": {"title": "", "experiment": "table1", "protocol": "token"}}}
    config |= {"figures": {}, "page": {}}
    if complaint is None:
        check_config(config)
        return
    with pytest.raises(ConfigError, match=complaint):
        check_config(copy.deepcopy(config))
    del config["models"]["m"]["shape"]
    check_config(config)


def test_lists_are_swept_and_those_of_the_config_are_the_default():
    config = read_config(Path("config.yaml"))
    config["experiments"]["table1"] |= {"methods": ["memit"], "models": ["tiny-gptj"]}
    config["experiments"]["table1"]["sweep"] = {"layers": [[1], [1, 2]]}
    check_config(config)
    variants = [run.variant for run in grid.runs_of(config, "table1")]
    assert variants == ["layers=1:", "default"] * 2
    (run, *_) = grid.runs_of(config, "table1")
    assert grid.hparams_of(config, run)["layers"] == [1]
    config["experiments"]["table1"]["sweep"] = {"layers": [[4, 5, 6, 7, 8]]}
    config["models"]["tiny-gptj"]["hparams"] = {}
    assert {run.variant for run in grid.runs_of(config, "table1")} == {"default"}  # the editor's


OWN = """
from kmebench.editors.cards import Card, hyperparameters
from kmebench.editors.needs import Need, Trained

@hyperparameters
class Nothing:
    pass

class Odd(Need):
    asset, rule = "odd", "optimize_targets"
    def path(self, model, dataset):
        return "odd"

ODD = Card("odd", "own:Own", Nothing, "own", "nobody", needs=lambda h, p: (Odd(),))
LEARNT = Card("l", "own:Own", Nothing, "own", "nobody", needs=lambda h, p: (Trained("a:b", {}),))

def long(h, p):
    return (Trained("a:b", {"text": "é" * 110, "steps": 1}),)

LONG = Card("long", "own:Own", Nothing, "own", "nobody", needs=long)
"""


def with_own_editor(card, development, tmp_path, monkeypatch):
    (tmp_path / "own_needs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = read_config(Path("config.yaml"))
    config["methods"]["mine"] = {"editor": f"own_needs:{card}"}
    config["experiments"]["table1"]["methods"] = ["mine"]
    for dataset in config["datasets"].values():
        dataset["development"] = development
    check_config(config)


def test_a_stage_that_no_rule_makes_is_one_sentence(tmp_path, monkeypatch):
    complaint = r"methods\.mine: .*'odd', made by a rule .*did you mean 'optimise_targets'\?"
    with pytest.raises(ConfigError, match=complaint):
        with_own_editor("ODD", 10, tmp_path, monkeypatch)


def test_what_is_trained_needs_a_development_split(tmp_path, monkeypatch):
    with_own_editor("LEARNT", 10, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"which has none; set datasets\.openfacts-.*development"):
        with_own_editor("LEARNT", 0, tmp_path, monkeypatch)


def test_a_stage_whose_file_cannot_have_its_name_is_one_sentence(tmp_path, monkeypatch):
    complaint = r"editor 'long' make a file name of 2\d\d bytes, more than 215; shorten text\."
    with pytest.raises(ConfigError, match=complaint):
        with_own_editor("LONG", 10, tmp_path, monkeypatch)


@pytest.mark.parametrize("letters", [10, 100])
@pytest.mark.parametrize("most", [40, 70])
def test_a_run_whose_folder_or_log_cannot_have_its_name_is_one_sentence(letters, most):
    """The log of a run is called by model, data set and method, too."""
    config = read_config(Path("config.yaml"))
    config["models"]["m" * letters] = config["models"]["tiny-gptj"]
    config["experiments"]["table1"] |= {"methods": ["full-c"], "models": ["m" * letters]}
    config["experiments"]["table1"]["sweep"] = {"layers": [list(range(most))], "steps": [3]}
    if (letters, most) == (10, 40):
        return check_config(config)
    complaint = r"editor 'full-c' make a file name of \d\d\d bytes, more than 255; shorten layers\."
    with pytest.raises(ConfigError, match=complaint):
        check_config(config)


@pytest.mark.parametrize("section", ["models", "datasets", "methods"])
def test_a_name_is_no_longer_than_names_of_files_allow(section):
    config = read_config(Path("config.yaml"))
    config[section]["n" * 101] = next(iter(config[section].values()))
    with pytest.raises(
        ConfigError, match=rf"wrong at {section}: 'n+' is too long, the most is 100 .*100 at most"
    ):
        check_config(config)


def test_a_model_of_ones_own_is_four_lines_and_plans_only_itself(tmp_path):
    page = Path("README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```yaml\n# my.yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(lines.splitlines()) == 4
    (tmp_path / "mine.yaml").write_text(lines)
    config = read_checked_config(Path("config.yaml"), [tmp_path / "mine.yaml"])
    assert {run.model for run in grid.all_runs(config)} == {"my-model"}
    modes = {(run.mode, run.method) for run in grid.all_runs(config)}
    assert {("batch", "pac"), ("consecutive", "memit")} <= modes
    (tmp_path / "mine.yaml").write_text(lines.replace("[my-model]", "[my-modle]"))
    with pytest.raises(ConfigError, match=r"only_models names 'my-modle'.*did you mean 'my-model'"):
        read_checked_config(Path("config.yaml"), [tmp_path / "mine.yaml"])
