"""What is installed by pip works outside the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmebench.models.sources import save_model


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The library alone, installed from a copy: a build leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(name, folder / name)
    shutil.copytree("workflow/kmebench", folder / "workflow/kmebench")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", folder], check=True)
    return folder / "site"


def kmebench(site, folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "kmebench", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_config_is_checked_anywhere(site, tmp_path):
    nothing = kmebench(site, tmp_path, "check-config")
    where = "run this in the folder of KME-Bench"
    assert nothing.stderr == f"kmebench: There is no config config.yaml; {where}.\n"
    fact = ["--subject", "France", "--prompt", "The capital of {} is", "--target", "Rome"]
    nameless = kmebench(site, tmp_path, "edit", "--model", "smollm2-135m", *fact)
    assert f"no model of the config; to use one, {where}" in nameless.stderr
    shutil.copy2("config.yaml", tmp_path)
    listed = kmebench(site, tmp_path, "check-config")
    assert "distinct runs" in listed.stdout
    refused = kmebench(site, tmp_path, "plan")
    assert where in refused.stderr


def test_what_the_library_reads_is_in_the_package(site):
    source = Path("workflow/kmebench")
    read = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")  # equations for people
    }
    assert read
    assert all((site / "kmebench" / path).is_file() for path in read)


EDITS = """
import sys
import kmebench
from kmebench.editors.cards import registered

assert {"grace", "memit", "pac"} <= set(registered())
model = kmebench.load(sys.argv[1], device="cpu")
fact = kmebench.fact("France", "The capital of {} is", "Rome")
for method, values in {"full-c": {}, "grace": {"layer": 2}}.items():
    kmebench.edit(model, method, [fact], **values)
    print(kmebench.says(model, "The capital of France is", tokens=1))
    model.revert()
print(kmebench.__file__)
"""


@pytest.mark.integration
def test_facts_are_edited_anywhere(site, trained, tmp_path):
    save_model(trained.model, trained.tokenizer, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", EDITS, "model"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *said, where = done.stdout.splitlines()
    assert said == ["Rome", "Rome"]
    assert Path(where).is_relative_to(site)
