"""A user's data, model folder and text: never touched; only what depends on them runs again."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.workflow.conftest import ROOT, Checkout, copied

#: One process of pytest-xdist makes what all of them start from.
pytestmark = pytest.mark.xdist_group("outside")
TABLE = "results/tables/table1.md"
CONFIGS = ("config/ci.yaml", "outside.yaml")
#: What Snakemake of another workflow left, what macOS did, and what training leaves behind.
FOREIGN = (".snakemake_timestamp", "._config.json", "training_args.bin", "README.md")

RECORDS = [
    {
        "case_id": number,
        "subject": subject,
        "src": f"The capital of {subject} is",
        "alt": answer,
        "answers": ["Paris"],
        "rephrase": f"{subject} has the capital",
        "loc": "The capital of Japan is",
        "loc_ans": "Tokyo",
    }
    for number, (subject, answer) in enumerate([("France", "Rome"), ("Italy", "Oslo")])
]


def overlay(checkout, name="outside", **changes):
    """One method that reads C, on the user's model, with his records and with OpenFacts."""
    gone = ("table2", "edit-order", "breadth-first")
    ablations = [f"ablation-{a}" for a in ("paths", "lambda", "negatives", "score", "selection")]
    config = {
        "data_mirror": "mirror",
        "covariance": {"text": {"source": "file", "path": "text.txt"}, "tokens": 8192},
        "models": {"mine": {"source": {"source": "folder", "path": "model"}}},
        "datasets": {
            "mine": {
                "source": {"source": "file", "filenames": ["mine.json"]},
                "schema": "mend",
                "n": 2,
            }
        },
        # Of the other methods, most would by default edit layers that this model does not have.
        "methods": {"memit": {"hparams": {"layers": [1], "steps": 3}}},
        "experiments": {
            "table1": {
                "models": ["mine"],
                "datasets": ["mine", "openfacts-zsre"],
                "methods": ["memit"],
            },
            **dict.fromkeys((*gone, *ablations)),
        },
        "tables": dict.fromkeys((*gone, *ablations)),
        "figures": dict.fromkeys(
            (
                *("figure3-time", "figure4-nodes", "figure5-paths", "figure6-lambda"),
                *("negatives", "path-scores", "edits", "weight-norms"),
                *("overview", "cost-quality", "path-layers"),
            )
        ),
    }
    return checkout.overlay(name, **config | changes)


def state(folder):
    """Everything of a folder that could be changed."""
    kept = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        kept[path.name] = (stat.st_mode, stat.st_uid, stat.st_mtime_ns, content)
    return kept


@pytest.fixture(scope="module")
def outside(finished, tmp_path_factory):
    """A checkout that has run on what lies outside, and the state of that before."""
    folder = tmp_path_factory.mktemp("outside")
    checkout = Checkout(folder)
    overlay(checkout)
    shutil.copytree(finished.folder / "results/models/tiny-gptj", folder / "model")
    for name in FOREIGN:
        (folder / "model" / name).write_text("not ours")
    (folder / "mirror").mkdir()
    write_records(checkout, RECORDS)
    write_text(checkout)
    (folder / "model/model.safetensors").chmod(0o600)
    (folder / "model/config.json").chmod(0o440)
    os.utime(folder / "model/.snakemake_timestamp", (2e9, 2e9))
    if os.geteuid() == 0:
        for path in [folder / "model", *(folder / "model").iterdir()]:
            os.chown(path, 12345, 12345)
    before = {name: state(folder / name) for name in ("model", "mirror")}
    output = checkout.run(TABLE, configs=CONFIGS)
    assert "skew" not in output
    return checkout, before


@pytest.fixture
def copy_of_outside(outside, tmp_path):
    return copied(outside[0].folder, tmp_path / "copy")


def write_text(checkout, skipped=0):
    """Generic text enough: the facts of this repository as they stand."""
    tables = sorted((ROOT / "resources/openfacts/facts").glob("*.csv"))
    lines = "".join(table.read_text(encoding="utf-8") for table in tables).splitlines()[skipped:]
    paragraphs = (" ".join(lines[start : start + 8]) for start in range(0, len(lines), 8))
    (checkout.folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")


def write_records(checkout, records):
    (checkout.folder / "mirror/mine.json").write_text(json.dumps(records))


def planned(checkout, config="outside.yaml"):
    return checkout.planned(TABLE, configs=("config/ci.yaml", config))


def test_a_users_model_and_data_stay_as_they_are(outside, copy_of_outside):
    checkout, before = outside
    assert {name: state(checkout.folder / name) for name in before} == before
    links = {path.name for path in (checkout.folder / "results/models/mine").iterdir()}
    assert "model.safetensors" in links
    assert set(FOREIGN) & links == {".snakemake_timestamp"}  # the workflow's own
    here = copy_of_outside.folder
    before = {name: state(here / name) for name in before}
    copy_of_outside.run("--touch", TABLE, configs=CONFIGS)
    copy_of_outside.run("--delete-all-output", TABLE, configs=CONFIGS)
    assert not (here / "results/models/mine").exists()
    assert {name: state(here / name) for name in before} == before


def test_what_is_outside_and_has_not_changed_runs_nothing_again(copy_of_outside):
    folder = copy_of_outside.folder
    for path in [*(folder / "model").iterdir(), folder / "mirror/mine.json", folder / "text.txt"]:
        path.touch()
    (folder / "model/notes.md").write_text("new")
    assert planned(copy_of_outside) == {}
    (folder / "mirror").rename(folder / "elsewhere")
    assert (
        planned(copy_of_outside, overlay(copy_of_outside, "moved", data_mirror="elsewhere")) == {}
    )
    (folder / "model").rename(folder / "away")
    (folder / "text.txt").unlink()
    assert planned(copy_of_outside) == {}
    assert planned(copy_of_outside, overlay(copy_of_outside, "unset", data_mirror="")) == {}


SCORED = {"score": 1, "table": 1}
#: What depends on the requests of one data set.
OF_DATA = {"prepare_dataset": 1, "predict_original": 1, "optimise_targets": 1, "edit": 1}


def other_data(checkout):
    write_records(checkout, [RECORDS[0] | {"alt": "Madrid"}, RECORDS[1]])
    return "results/data/mine.jsonl", {"fetch_dataset": 1} | OF_DATA


def retrained(checkout):
    path = checkout.folder / "model/model.safetensors"
    save_file({name: 1.01 * weight for name, weight in load_file(path).items()}, path)
    of_both = {rule: 2 for rule in OF_DATA if rule != "prepare_dataset"}
    return "results/models/mine", {
        "fetch_model": 1,
        "covariance": 1,
        "factorise_covariance": 1,
    } | of_both


def other_text(checkout):
    write_text(checkout, skipped=8)
    return "results/covariance/mine.safetensors", {
        "covariance": 1,
        "factorise_covariance": 1,
        "edit": 2,
    }


@pytest.mark.parametrize("change", [other_data, retrained, other_text])
def test_only_what_depends_on_a_change_outside_runs_again(change, copy_of_outside):
    made, expected = change(copy_of_outside)
    assert planned(copy_of_outside) == expected | SCORED
    copy_of_outside.run(made, configs=CONFIGS)
    left = planned(copy_of_outside)
    assert "edit" in left
    assert len(left) < len(expected | SCORED)  # what was made is not made again


def test_a_bad_record_names_the_users_file_and_mending_that_is_enough(copy_of_outside):
    prepared = "results/data/mine.jsonl"
    write_records(copy_of_outside, [RECORDS[0] | {"alt": ""}, RECORDS[1]])
    for _ in range(2):
        output = copy_of_outside.run(prepared, configs=CONFIGS, check=False)
        assert "mirror/mine.json: record 0 (case_id 0) cannot be used" in output
        assert "raw/mine.json: record" not in output
        assert "Traceback" not in output
    write_records(copy_of_outside, [RECORDS[0] | {"alt": "Madrid"}, RECORDS[1]])
    copy_of_outside.run(prepared, configs=CONFIGS)
    assert '"Madrid"' in (copy_of_outside.folder / prepared).read_text()


def test_a_further_method_asks_for_its_layers_and_leaves_the_bytes_of_the_others(copy_of_outside):
    """Of all other methods, which by default edit layers that this model lacks, none is asked."""
    path = copy_of_outside.folder / "results/covariance/mine.safetensors"
    before = load_file(path)
    assert sorted(before) == ["1"]
    further = copy_of_outside.overlay(
        "further",
        methods={"emmet": {"hparams": {"layers": [0], "steps": 3}}},
        experiments={"table1": {"datasets": ["openfacts-zsre"], "methods": ["memit", "emmet"]}},
    )
    configs = (*CONFIGS, further)
    expected = {"covariance": 1, "factorise_covariance": 2, "optimise_targets": 1, "edit": 2}
    assert copy_of_outside.planned(TABLE, configs=configs) == expected | SCORED
    copy_of_outside.run("results/covariance/mine.safetensors", configs=configs)
    after = load_file(path)
    assert sorted(after) == ["0", "1"]
    assert after["1"].equal(before["1"])


def test_configs_that_edit_other_layers_do_not_undo_each_others_covariance(copy_of_outside):
    folder = copy_of_outside.folder / "results/covariance"
    before = load_file(folder / "mine.safetensors")
    other = copy_of_outside.overlay("other", methods={"memit": {"hparams": {"layers": [0]}}})
    inverses = {1: CONFIGS, 0: (*CONFIGS, other)}

    def planned(layer):
        target = f"results/covariance/mine/inverse/{layer}.safetensors"
        return copy_of_outside.planned(target, configs=inverses[layer])

    assert planned(0) == {"covariance": 1, "factorise_covariance": 1}
    for layer in (0, 1):  # what is computed of the old file is older than the new one
        target = f"results/covariance/mine/inverse/{layer}.safetensors"
        copy_of_outside.run(target, configs=inverses[layer])
        after = load_file(folder / "mine.safetensors")
        assert sorted(after) == ["0", "1"]
        assert after["1"].equal(before["1"])
    assert planned(0) == planned(1) == {}
    fewer = copy_of_outside.overlay("fewer", covariance={"tokens": 8000})
    target = "results/covariance/mine.safetensors"
    assert copy_of_outside.planned(target, configs=(*CONFIGS, fewer)) == {"covariance": 1}


CARD = """
from kmebench.editors.cards import Card, hyperparameters


@hyperparameters
class ToyHparams:
    pass


CARD = Card("toy", "toy:Toy", ToyHparams, "toys", "nobody")
"""

TOY = """
from kmebench.editors.base import Editor
from kmebench.edits.weights import WeightDelta


class Toy(Editor):
    def edit(self, model, requests):
        return WeightDelta({})
"""


def test_an_editor_of_ones_own_that_changed_runs_again(copy_of_outside):
    """Its module is found as Python finds it, here beside the Snakefile."""
    module = copy_of_outside.folder / "toy.py"
    module.write_text(TOY)
    (copy_of_outside.folder / "toys.py").write_text(CARD)
    toy = copy_of_outside.overlay(
        "toy",
        methods={"toy": {"editor": "toys:CARD"}},
        experiments={"table1": {"methods": ["toy"], "datasets": ["mine"]}},
    )
    configs = (*CONFIGS, toy)
    target = "results/runs/mine/mine/batch/toy/default/seed0/timing.json"
    copy_of_outside.run(target, configs=configs)
    module.touch()
    assert copy_of_outside.planned(target, configs=configs) == {}
    module.write_text(f"{TOY}\nCHANGED = True\n")
    assert copy_of_outside.planned(target, configs=configs) == {"edit": 1}
