"""The source files a script depends on."""

import pytest

from kmebench.errors import ConfigError
from kmebench.planning.dependencies import source_closure

LIBRARY = "workflow/kmebench"

FULL_C = "editors/finetune/full_c.py"


def closure(rule, *modules):
    return source_closure(f"workflow/scripts/{rule}.py", *modules)


def test_an_edit_depends_on_its_own_editor_only():
    files = closure("edit", "kmebench.editors.pac.pac")
    assert f"{LIBRARY}/editors/pac/pac.py" in files
    assert f"{LIBRARY}/editors/pac/paths.py" in files
    assert f"{LIBRARY}/pipelines/pipelines.py" in files
    assert f"{LIBRARY}/{FULL_C}" not in files
    assert f"{LIBRARY}/reporting/tables.py" not in files
    assert f"{LIBRARY}/{FULL_C}" in closure("edit", "kmebench.editors.finetune.full_c")


def test_scores_and_tables_depend_on_no_model_code():
    for rule in ("score", "table"):
        files = closure(rule)
        assert f"workflow/scripts/{rule}.py" in files
        assert not any("models/" in f or "editors/" in f for f in files)


@pytest.mark.parametrize("kind", ["package", "namespace"])
def test_an_editor_of_ones_own_counts_with_what_it_imports_of_its_package(
    kind, tmp_path, monkeypatch
):
    package = tmp_path / f"own_{kind}"
    package.mkdir()
    for name, text in {
        "__init__": "raise RuntimeError('imported')",
        "editor": "from kmebench.editors.kn.kn import KN\nfrom .helper import x\nimport json",
        "helper": f"import own_{kind}.deeper",
        "deeper": "import own_alone",
        "unused": "",
    }.items():
        if (kind, name) != ("namespace", "__init__"):
            (package / f"{name}.py").write_text(text)
    (tmp_path / "own_alone.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    added = set(closure("edit", f"own_{kind}.editor")) - set(closure("edit"))
    own = {str(package / f"{name}.py") for name in ("editor", "helper", "deeper")}
    assert own <= added
    assert f"{LIBRARY}/editors/kn/attribution.py" in added
    assert not {f"{package}/unused.py", f"{tmp_path}/own_alone.py"} & added
    assert str(tmp_path / "own_alone.py") in closure("edit", "own_alone")
    assert closure("edit", "nowhere.to.be.found") == closure("edit")


def test_an_editor_that_is_no_python_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text("x = 1\ndef")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"own_broken\.py, line 2: invalid syntax"):
        closure("edit", "own_broken")


def test_paths_are_relative_to_the_checkout():
    assert not any(path.startswith("/") for path in closure("edit"))


def test_what_decides_no_result_is_no_input():
    files = closure("edit", "kmebench.editors.locate.memit")
    left_out = ("errors.py", "names.py", "io/logs.py", "__init__.py", "editors/locate/cards.py")
    assert not {f"{LIBRARY}/{name}" for name in left_out} & set(files)
    assert not any("/planning/" in file for file in files)
    family = {f"{LIBRARY}/editors/locate/{name}.py" for name in ("memit", "targets", "updates")}
    assert family <= set(files)
