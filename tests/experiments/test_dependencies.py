"""The source files a script depends on."""

from kmebench.experiments.dependencies import source_closure

LIBRARY = "workflow/kmebench"


def closure(rule, *modules):
    return source_closure(f"workflow/scripts/{rule}.py", *modules)


def test_an_edit_depends_on_its_own_editor_only():
    files = closure("edit", "kmebench.editors.pac")
    assert f"{LIBRARY}/editors/pac.py" in files
    assert f"{LIBRARY}/tracing/paths.py" in files
    assert f"{LIBRARY}/experiments/session.py" in files
    assert f"{LIBRARY}/editors/full_c.py" not in files
    assert f"{LIBRARY}/reporting/tables.py" not in files
    assert f"{LIBRARY}/editors/full_c.py" in closure("edit", "kmebench.editors.full_c")


def test_scores_and_tables_depend_on_no_model_code():
    for rule in ("score", "table"):
        files = closure(rule)
        assert f"workflow/scripts/{rule}.py" in files
        assert not any("models/" in f or "editors/" in f for f in files)


def test_an_editor_from_elsewhere_adds_nothing():
    assert closure("edit", "somebody.else") == closure("edit")


def test_paths_are_relative_to_the_checkout():
    assert not any(path.startswith("/") for path in closure("edit"))
