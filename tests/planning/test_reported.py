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


def test_the_overview_shows_the_default_runs_of_both_pipelines():
    config = config_of("consecutive", 0)
    swept = config["experiments"]["table2"] | {"seeds": [0, 1]}
    config["experiments"] = {"table1": swept | {"mode": "batch"}, "table2": swept}
    reported, asked = Reported(config, "results"), SimpleNamespace(figure="overview")
    files = [f"<results>/metrics/{name}.parquet" for name in ("table1", "table2")]
    assert reported.figure_files(asked) == files
    told = reported.figure(asked)
    shown = [(run["mode"], run["method"], run["seed"]) for run in told["runs"]]
    wanted = [(mode, method, 0) for mode in ("batch", "consecutive") for method in ("none", "pac")]
    assert sorted(shown) == sorted(wanted)
    assert set(told["styles"]) == set(told["labels"]["methods"].values())


def test_the_layer_map_reads_the_paths_of_which_the_nodes_are_made():
    reported = Reported(config_of("consecutive", 0), "results")
    (paths,) = reported.figure_files(SimpleNamespace(figure="path-layers"))
    (nodes,) = reported.figure_files(SimpleNamespace(figure="figure4-nodes"))
    assert paths == nodes.replace("/nodes/", "/paths/").replace(".parquet", ".safetensors")


@pytest.mark.parametrize("figure", ["overview", "edits", "path-layers", "cost-quality"])
def test_captions_say_how_many_edits_a_cell_holds(figure):
    config = copy.deepcopy(CONFIG)
    for dataset, n in (("openfacts-zsre", 4), ("openfacts-counterfact", 4)):
        config["datasets"][dataset]["n"] = n
    assert Reported(config, "results").caption(figure).endswith("4 edits per cell.")
    config["datasets"]["openfacts-zsre"]["n"] = 6
    assert Reported(config, "results").caption(figure).endswith("4 to 6 edits per cell.")
