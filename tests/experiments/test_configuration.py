"""Wrong figures are refused before anything runs."""

from pathlib import Path

import pytest

from kmebench.errors import ConfigError
from kmebench.experiments.configuration import check_config, read_config

SCHEMA = "workflow/schemas/config.schema.yaml"


def checked(**figure):
    config = read_config(Path("config.yaml"))
    config["figures"] = {"mine": {"title": "Mine"} | figure}
    check_config(config, SCHEMA)


@pytest.mark.parametrize(
    ("figure", "complaint"),
    [
        ({"kind": "sweep", "experiment": "table2"}, "figures.mine"),
        ({"kind": "time"}, "figures.mine"),
        ({"kind": "paper", "experiment": "table2"}, "figures.mine"),
        ({"kind": "pie", "experiment": "table2"}, "figures.mine"),
        ({"kind": "time", "experiment": "table3"}, "did you mean 'table"),
        ({"kind": "paper", "tables": ["table3"]}, "did you mean 'table"),
        (
            {"kind": "sweep", "experiment": "ablation-paths", "parameter": "path"},
            "did you mean 'paths'",
        ),
        ({"kind": "edits", "experiment": "table1"}, "edits in mode 'batch'"),
    ],
)
def test_a_figure_that_would_show_nothing_is_refused(figure, complaint):
    with pytest.raises(ConfigError, match=complaint):
        checked(**figure)


def test_a_sweep_may_be_over_seeds_and_figures_may_share_an_experiment():
    checked(kind="sweep", experiment="edit-order", parameter="seed")
    checked(kind="paper", tables=["table1", "table2"])


def test_an_overlay_takes_entries_out_by_null(tmp_path):
    overlay = tmp_path / "fewer.yaml"
    overlay.write_text("figures: {edits: null}\nexperiments: {edit-order: null}\n")
    config = read_config(Path("config.yaml"), [overlay])
    with pytest.raises(ConfigError, match=r"tables\.edit-order\.experiment"):
        check_config(config, SCHEMA)  # a table still asks for it
    config = read_config(Path("config.yaml"), [overlay])
    config["tables"]["edit-order"] = None
    check_config(config, SCHEMA)
    assert "edits" not in config["figures"]
    assert "edit-order" not in config["experiments"] | config["tables"]


def test_a_method_may_be_its_name_alone():
    config = read_config(Path("config.yaml"))
    config["methods"]["memit"] = None
    check_config(config, SCHEMA)
    assert config["methods"]["memit"] == {}
