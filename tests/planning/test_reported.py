"""What the rules that report, and those that measure, read and are told."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from kmebench.planning import grid
from kmebench.planning.config import check_config, read_config
from kmebench.planning.inputs import Inputs
from kmebench.planning.reported import Reported

CONFIG = read_config(Path("config.yaml"))
check_config(CONFIG)
NEUTRAL = "<results>/original/tiny-gptj/neutral.safetensors"


def config_of(mode, texts):
    """The default config with one experiment of PAC and the floor."""
    config = copy.deepcopy(CONFIG)
    table2 = config["experiments"]["table2"] | {"mode": mode, "methods": ["none", "pac"]}
    config["experiments"] = {
        "table2": table2 | {"models": ["tiny-gptj"], "datasets": ["openfacts-zsre"]}
    }
    config["health"]["texts"] = texts
    return config


@pytest.mark.parametrize(
    ("mode", "texts", "measures"),
    [
        ("consecutive", 2, True),
        ("consecutive", 0, False),
        ("batch", 2, False),
        ("breadth_first", 2, True),
    ],
)
def test_health_is_asked_for_where_a_run_leaves_an_edited_model(mode, texts, measures):
    config = config_of(mode, texts)
    (run, _) = grid.runs_of(config, "table2")
    needed = Inputs(config, "results", "").edit(SimpleNamespace(**vars(run)))
    assert (needed.get("neutral") == NEUTRAL) == measures
    scored = Reported(config, "results").health_files(SimpleNamespace(experiment="table2"))
    runs = grid.runs_of(config, "table2")
    assert scored == [f"<results>/{run.folder()}/health.json" for run in runs] * measures


def test_the_floor_stands_in_tables_and_curves_but_takes_no_time_and_has_no_norm():
    reported = Reported(config_of("consecutive", 2), "results")
    table = reported.table(SimpleNamespace(table="table2"))
    assert list(table["methods"]) == ["none", "pac"]
    assert table["controls"] == ["none"]
    for figure, shown in (("figure3-time", ["pac"]), ("weight-norms", ["pac"])):
        told = reported.figure(SimpleNamespace(figure=figure))
        assert [run["method"] for run in told["runs"]] == shown
        assert len(reported.figure_files(SimpleNamespace(figure=figure))) == len(shown)
    edits = reported.figure(SimpleNamespace(figure="edits"))
    assert edits["labels"]["methods"]["none"] == "No edit"
    assert {run["method"] for run in edits["runs"]} == {"none", "pac"}


def page_of(*methods, **page):
    """The default config with both pipelines of some methods on two data sets."""
    config = copy.deepcopy(CONFIG)
    datasets = ["openfacts-zsre", "openfacts-counterfact"]
    grid_of = {"models": ["tiny-gptj"], "datasets": datasets, "methods": list(methods)}
    config["experiments"] = {mode: {"mode": mode} | grid_of for mode in ("batch", "consecutive")}
    config["page"] |= page
    return Reported(config, "results")


def test_the_page_compares_pipelines_and_the_editor_it_looks_at_with_its_baseline():
    pairs = page_of("none", "full-c", "pac").page_pairs
    told = [(p["question"], p["dataset"], p["mode"], p["editor"], p["other"]) for p in pairs]
    zsre = [
        pair[:1] + pair[2:]
        for pair in told
        if pair[1] == CONFIG["datasets"]["openfacts-zsre"]["label"]
    ]
    assert zsre == [
        ("against", "batch", "PAC", "Full-C"),
        ("forgets", "consecutive", "No edit", "No edit"),
        ("forgets", "consecutive", "Full-C", "Full-C"),
        ("forgets", "consecutive", "PAC", "PAC"),
        ("against", "consecutive", "PAC", "Full-C"),
    ]
    assert len(told) == 2 * len(zsre)
    forgets = next(pair for pair in pairs if pair["question"] == "forgets")
    assert forgets["b"] == forgets["a"].replace("consecutive", "batch")


def test_the_fact_is_of_the_first_data_set_and_every_editor_but_the_floor():
    reported = page_of("none", "full-c", "pac")
    fact = reported.page()["fact"]
    assert list(fact["folders"]) == ["PAC", "Full-C"]
    assert all("/openfacts-zsre/batch/" in folder for folder in fact["folders"].values())
    (paths,) = reported.fact_paths(None)
    assert paths.startswith("<results>/trace/tiny-gptj/openfacts-zsre/paths/")


def test_another_editor_can_be_looked_at_and_one_that_is_not_run_is_left_out():
    reported = page_of("full-c", "rome", editor="rome")
    assert reported.page()["fact"]["editor"] == "ROME"
    assert reported.fact_paths(None) == []
    without = page_of("full-c", "rome")
    assert without.page()["fact"] == {}
    assert without.fact_paths(None) == []
    assert {pair["question"] for pair in without.page_pairs} == {"forgets"}


def test_the_page_shows_the_config_but_no_folder_of_this_machine():
    config = copy.deepcopy(CONFIG) | {"data_mirror": "/some/where"}
    shown = Reported(config, "results").page()["config"]
    assert "/some/where" not in shown
    assert "experiments:" in shown
