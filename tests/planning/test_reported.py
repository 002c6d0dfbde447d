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
