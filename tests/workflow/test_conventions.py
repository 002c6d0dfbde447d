"""Habits of this repository that a machine can check."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from kmebench.editors.cards import registered
from tests.workflow import forked

SCRIPTS = sorted(Path("workflow/scripts").glob("*.py"))
RULES = "\n".join(path.read_text() for path in Path("workflow/rules").glob("*.smk"))
COMMON = "\n".join(path.read_text() for path in Path("workflow").glob("*.smk"))
LIBRARY = sorted(Path("workflow/kmebench").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (*LIBRARY, *SCRIPTS)}


def module_name(path):
    """``workflow/kmebench/io/files.py`` -> ``kmebench.io.files``."""
    return ".".join(path.relative_to("workflow").with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in LIBRARY}


def test_every_script_is_named_after_the_rule_that_runs_it():
    used = set(re.findall(r'"\.\./scripts/(\w+)\.py"', RULES))
    assert used == {path.stem for path in SCRIPTS}
    rules = set(re.findall(r"^rule (\w+):", RULES, re.MULTILINE))
    assert used - {"edit"} <= rules


def test_rules_that_ask_for_a_gpu_are_sent_to_its_partition_and_no_others():
    blocks = re.split(r"^(?:use rule \w+ as|rule) (\w+)(?: with)?:", RULES, flags=re.MULTILINE)[1:]
    asking = {name for name, body in zip(blocks[::2], blocks[1::2], strict=True) if "gpu=" in body}
    profile = yaml.safe_load(Path("profiles/slurm/config.yaml").read_text(encoding="utf-8"))
    sent = {
        name
        for name, resources in profile["set-resources"].items()
        if resources["slurm_partition"] == "gpu"
    }
    assert sent == asking


def test_scripts_are_short_documented_and_read_no_config():
    for path in SCRIPTS:
        text = path.read_text()
        assert len(text.splitlines()) < 40, path
        assert ast.get_docstring(ast.parse(text)), path
        assert "snakemake.config" not in text, path
        assert "script_log(snakemake)" in text, path


def test_nothing_loads_pickles_or_remote_code():
    forbidden = re.compile(r"torch\.load|pickle|joblib|[^.\w]eval\(|shell=True")
    for path in [*LIBRARY, *SCRIPTS, *Path("workflow").glob("*.smk")]:
        assert not forbidden.search(path.read_text()), path
    for path, tree in TREES.items():  # unless told, transformers asks whoever sits at a terminal
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                said = {given.arg: ast.unparse(given.value) for given in node.keywords}
                assert said.get("trust_remote_code") == "False", (path, node.lineno)


def test_the_core_never_imports_upwards():
    order = ["io", "data", "edits", "models", "editors", "evaluation", "planning", "reporting"]
    order += ["pipelines", "cli"]
    assert set(order) == {path.parts[2] for path in LIBRARY if len(path.parts) > 3}
    for path in LIBRARY:
        package = path.relative_to("workflow/kmebench").parts[0]
        if package in order:
            above = order[order.index(package) + 1 :]
            names = re.findall(r"^from kmebench\.(\w+)", path.read_text(), re.MULTILINE)
            assert set(names).isdisjoint(above), path


def test_a_function_fits_on_a_screen():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def imported(tree):
    """The modules of this library that a module imports when it is itself imported."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: set(imported(TREES[path])) for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # a circle is a CycleError
    assert set(order) == set(MODULES)
    assert "kmebench.planning.grid" in graph["kmebench.planning.config"]


TORCHLESS = """
import importlib, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def without_torch(*modules):
    command = [sys.executable, "-c", TORCHLESS, *modules]
    path = f"workflow{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_planning_scoring_and_reporting_import_no_torch():
    used = re.findall(r"^from (kmebench[\w.]*) import", RULES + COMMON, re.MULTILINE)
    assert used
    inside = ("kmebench.planning.", "kmebench.reporting.", "kmebench.evaluation.score")
    inside += ("kmebench.evaluation.protocols", "kmebench.evaluation.statistics")
    done = without_torch(*used, *(name for name in MODULES if name.startswith(inside)))
    assert done.returncode == 0, done.stderr
    assert "torch must not be imported" in without_torch("kmebench.models.editable").stderr


#: What is called like an editor and is none: two forms of data sets, and two families.
NAMESAKES = {
    ("data/forms.py", "mend"),
    ("data/forms.py", "rome"),
    ("planning/appearance.py", "kn"),
    ("planning/appearance.py", "pac"),
}


def compared(tree):
    """The texts that a module compares something with, or keeps something by."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                parts = [node]
            case ast.MatchValue(value):
                parts = [value]
            case ast.Dict(keys):
                parts = [key for key in keys if key]
            case _:
                continue
        for part in parts:
            yield from (n.value for n in ast.walk(part) if isinstance(n, ast.Constant))


def test_no_editor_is_told_by_its_name_outside_its_family():
    names, found = set(registered()), set()
    for path in LIBRARY:
        inside = path.relative_to("workflow/kmebench")
        if inside.parts[0] != "editors" or len(inside.parts) == 2:
            found |= {(str(inside), text) for text in compared(TREES[path]) if text in names}
    assert found == NAMESAKES


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


def snakemake(folder, *arguments):
    """Run Snakemake here; return its exit status and what it says."""
    path = f"{Path('workflow').resolve()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment, said = os.environ | {"PYTHONPATH": path}, folder / "said.txt"
    status = forked.snakemake(arguments, Path.cwd(), environment, said)
    return status, said.read_text(encoding="utf-8")


@pytest.mark.integration
def test_the_docs_show_the_rule_graph_as_it_is(tmp_path):
    status, graph = snakemake(tmp_path, "--rulegraph", "mermaid-js")
    assert status == 0, graph
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", graph))
    drawn = re.findall(r"(id\d+) --> (id\d+)", graph)
    edges = {(names[a], names[b]) for a, b in drawn if names[b] != "all"}
    page = Path("docs/running.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^    (\w+) --> (\w+)$", page, re.MULTILINE)) == direct(edges)
    grouped = re.findall(r"^        (\w+)$", page.split("```mermaid")[1], re.MULTILINE)
    assert sorted(grouped) == sorted({name for edge in edges for name in edge})


def direct(edges):
    """The arrows of a graph that no longer way replaces: they alone say what leads where."""

    def leads(a, b):
        return a == b or any(leads(after, b) for before, after in edges if before == a)

    return {
        (a, b)
        for a, b in edges
        if not any(leads(after, b) for before, after in edges if before == a and after != b)
    }


def test_an_arrow_that_a_longer_way_replaces_is_not_direct():
    assert direct({("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")}) == {
        ("a", "b"),
        ("b", "c"),
        ("d", "c"),
    }


@pytest.mark.integration
def test_snakemake_lint_finds_nothing(tmp_path):
    status, said = snakemake(tmp_path, "--lint", "--configfile", "config/ci.yaml")
    assert status == 0, said
