"""Environments of rules: what envs/ asks for exists, and the library is found inside them."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from rattler import MatchSpec

ENVIRONMENTS = sorted(Path("envs").glob("*.yaml"))

#: What Snakemake asks of conda. An environment is a venv of the tests' Python that sees its
#: packages, but no editable install: those need a .pth of the site-packages itself.
CONDA = """#!{python}
import json, pathlib, subprocess, sys
prefix = pathlib.Path(__file__).parents[1]
words = sys.argv[1:]
if words[:1] == ["info"]:
    print(json.dumps({{"conda_prefix": str(prefix), "platform": "linux-64"}}))
elif words[:1] == ["--version"]:
    print("conda 26.5.0")
elif words[:1] == ["config"]:
    print(json.dumps({{"get": {{"channel_priority": "strict"}}}}))
elif words[:2] == ["env", "create"]:
    target = pathlib.Path(words[words.index("--prefix") + 1])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    (site,) = target.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text({packages!r})
elif words[:1] != ["clean"]:
    sys.exit(f"the stand-in for conda does not know {{words}}")
"""
ACTIVATE = 'echo "$1" >> {folder}/activated; export PATH="$1/bin:$PATH"\n'


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_conda_understands_what_an_environment_asks_for(path):
    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "nodefaults" in asked["channels"]
    specs = [MatchSpec(d) for d in asked["dependencies"] if isinstance(d, str)]
    assert {spec.name.normalized for spec in specs} == {"python", "pip"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_the_pins_of_an_environment_can_be_installed_together(path):
    *_, pip = yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--quiet"]
    report = [*command, "--report", "-", "--constraint", "constraints.txt", *pip["pip"]]
    done = subprocess.run(report, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    missing = {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]}
    assert not missing  # all pins are what the tests themselves run with


@pytest.mark.slow
def test_a_rule_finds_the_library_in_a_conda_environment(copy_of_finished, tmp_path):
    folder, binaries = copy_of_finished.folder, tmp_path / "conda/bin"
    binaries.mkdir(parents=True)
    packages = sysconfig.get_paths()["purelib"]
    (binaries / "conda").write_text(CONDA.format(python=sys.executable, packages=packages))
    (binaries / "conda").chmod(0o755)
    (binaries / "activate").write_text(ACTIVATE.format(folder=tmp_path))
    table = folder / "results/tables/table2.csv"
    before = table.read_bytes()
    table.unlink()
    path = f"{binaries}:{Path(sys.executable).parent}:/usr/bin:/bin"
    asked = ("results/tables/table2.csv", "--use-conda", "--allowed-rules", "table")
    copy_of_finished.run(*asked, PATH=path)
    assert table.read_bytes() == before
    (environment,) = set((tmp_path / "activated").read_text().split())
    probe = [f"{environment}/bin/python", "-I", "-c", "import kmebench"]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "No module named 'kmebench'" in done.stderr  # so the rule found it by other means


@pytest.mark.slow
def test_without_conda_the_workflow_says_what_is_missing(copy_of_finished):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    asked = ("results/tables/table2.csv", "--dry-run", "--forcerun", "table", "--use-conda")
    message = copy_of_finished.run(*asked, check=False, PATH=path)
    assert "Is conda installed and accessible?" in message
