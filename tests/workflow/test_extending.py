"""docs/extending.md, followed to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from kmebench.editors.locate.covariance.store import Covariances
from kmebench.edits.edit import Edit
from kmebench.io.tensors import TensorFile
from tests.workflow.conftest import ROOT, copied

CARDS = "workflow/kmebench/editors/locate/cards.py"


def page(kind):
    """The files that the page shows, by name: those of this repository, or the others."""
    text = Path("docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 10
    here = ("workflow/", "tests/")
    return {name: code for name, code in blocks if name.startswith(here) == (kind == "here")}


#: The tiny model has four layers, and few steps are enough to compare by.
TINY = {
    "methods": {
        "part": {"hparams": {"layers": [1, 2], "steps": 5, "part": 1.0}},
        "mean": {"hparams": {"size": 0.5}},
    },
    "experiments": {"table1": {"datasets": ["openfacts-zsre"]}},
}


def test_an_editor_in_this_repository_is_one_file_and_one_card(finished, tmp_path):
    checkout = copied(finished.folder, tmp_path / "copy")
    for name, code in page("here").items():
        file = checkout.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        file.write_text(f"{before}\n\n{code}", encoding="utf-8")
    overlay = checkout.overlay(
        "part", methods=TINY["methods"], experiments={"table1": {"methods": ["memit", "part"]}}
    )
    configs = ("config/ci.yaml", overlay)
    with pytest.raises(AssertionError, match="no editor 'mean'"):
        checkout.planned("metrics", configs=configs)
    overlay = checkout.overlay(
        "part",
        methods={"part": TINY["methods"]["part"]},
        experiments={"table1": {"methods": ["memit", "part"]}},
    )
    # Covariance and targets are those that MEMIT has made; no other editor runs again.
    assert checkout.planned("metrics", configs=configs) == {"edit": 2, "score": 1}


def test_an_editor_that_takes_gradients_passes_the_test_beside_it(tmp_path):
    for folder in ("workflow/kmebench", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name, code in page("here").items():
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "workflow")}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    tests += ["tests/editors/finetune/test_steepest.py"]
    done = subprocess.run(tests, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package of the page, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    files = page("own")
    overlay = files.pop("mine.yaml")
    for name, code in files.items():
        path = folder / "my-editors" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", folder / "my-editors"], check=True)
    return folder / "site", overlay


def predictions(checkout, method):
    run = f"results/runs/tiny-gptj/openfacts-zsre/batch/{method}/default/seed0"
    return pd.read_parquet(checkout.folder / run / "predictions.parquet")


def test_an_installed_package_brings_editors_with_their_stages(installed, finished, tmp_path):
    site, overlay = installed
    checkout = copied(finished.folder, tmp_path / "copy")
    (checkout.folder / "mine.yaml").write_text(overlay, encoding="utf-8")
    configs = ("config/ci.yaml", "mine.yaml", checkout.overlay("tiny", **TINY))
    search = {"PYTHONPATH": str(site)}
    checkout.run("results/metrics/table1.parquet", configs=configs, **search)

    # With all of the residual it is MEMIT, from MEMIT's covariance and targets.
    memit, part = predictions(checkout, "memit"), predictions(checkout, "part")
    pd.testing.assert_frame_equal(part, memit)
    layers = Covariances.open(checkout.folder / "results/covariance/tiny-gptj.safetensors").layers
    assert layers == (1, 2)

    # What is learnt is learnt from the development split.
    folder = checkout.folder / "results/trained/tiny-gptj/openfacts-zsre"
    trained = TensorFile.open(
        folder / "my_editors.mean.train+steps=1.safetensors", "my_editors.mean.v1"
    )
    split = (checkout.folder / "results/data/openfacts-zsre.development.jsonl").read_text()
    held_out = [yaml.safe_load(line)["case_id"] for line in split.splitlines()]
    assert trained.facts["case_ids"] == held_out

    consecutive = checkout.overlay("consecutive", experiments={"table1": {"mode": "consecutive"}})
    run = "results/runs/tiny-gptj/openfacts-zsre/consecutive/mean/default/seed0"
    delta = f"{run}/delta.safetensors"
    checkout.run(delta, configs=(*configs, consecutive), **search)
    (change,) = Edit.load(checkout.folder / delta).weights.values()
    torch.testing.assert_close(change.values[0], 4 * 0.5 * trained.tensor("mean"))

    # A changed equation runs its own runs again, a changed training those of its stage.
    module = site / "my_editors/part.py"
    module.write_text(module.read_text() + "\nCHANGED = True\n")
    target = "results/metrics/table1.parquet"
    planned = checkout.run("--dry-run", target, configs=configs, **search)
    assert re.search(r"^edit +1$", planned, re.MULTILINE)
    assert not re.search(r"^(train_stage|optimise_targets|covariance) ", planned, re.MULTILINE)
