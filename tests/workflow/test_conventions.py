"""Habits of this repository that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

SCRIPTS = sorted(Path("workflow/scripts").glob("*.py"))
RULES = "\n".join(path.read_text() for path in Path("workflow/rules").glob("*.smk"))
LIBRARY = sorted(Path("workflow/kmebench").rglob("*.py"))


def test_every_script_is_named_after_the_rule_that_runs_it():
    used = set(re.findall(r'"\.\./scripts/(\w+)\.py"', RULES))
    assert used == {path.stem for path in SCRIPTS}
    rules = set(re.findall(r"^rule (\w+):", RULES, re.MULTILINE))
    assert used - {"edit"} <= rules


def test_scripts_are_short_documented_and_read_no_config():
    for path in SCRIPTS:
        text = path.read_text()
        assert len(text.splitlines()) < 40, path
        assert ast.get_docstring(ast.parse(text)), path
        assert "snakemake.config" not in text, path
        assert "script_log(snakemake)" in text, path


def test_nothing_loads_pickles_or_remote_code():
    forbidden = re.compile(r"torch\.load|pickle|joblib|trust_remote_code|[^.\w]eval\(|shell=True")
    for path in [*LIBRARY, *SCRIPTS, *Path("workflow").glob("*.smk")]:
        assert not forbidden.search(path.read_text()), path


def test_the_core_never_imports_upwards():
    order = ["io", "data", "edits", "models", "editors", "evaluation", "pipelines", "cli"]
    for path in LIBRARY:
        package = path.relative_to("workflow/kmebench").parts[0]
        if package not in order:
            continue
        above = order[order.index(package) + 1 :]
        for name in re.findall(r"^from kmebench\.(\w+)", path.read_text(), re.MULTILINE):
            assert name not in above or (package, name) == ("editors", "evaluation"), path


def test_environments_pin_what_the_constraints_pin():
    pins = dict(
        line.split("==")
        for line in Path("constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for path in Path("envs").glob("*.yaml"):
        (pip,) = [
            d["pip"] for d in yaml.safe_load(path.read_text())["dependencies"] if dict is type(d)
        ]
        for requirement in pip:
            name, version = requirement.split("==")
            assert pins[name] == version, (path, name)
    assert pins["torch"] == "2.13.0"


def test_the_readme_shows_the_rule_graph_as_it_is():
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", done.stdout))
    drawn = re.findall(r"(id\d+) --> (id\d+)", done.stdout)
    edges = {(names[a], names[b]) for a, b in drawn if names[b] != "all"}
    readme = Path("README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^    (\w+) --> (\w+)$", readme, re.MULTILINE)) == edges


def test_snakemake_lint_finds_nothing():
    command = [sys.executable, "-m", "snakemake", "--lint", "--configfile", "config/ci.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
