"""What the page of the results compares, looks at and reads."""

import copy
from pathlib import Path

from kmebench.planning.config import check_config, read_config
from kmebench.planning.page import Page
from kmebench.planning.reported import Reported

CONFIG = read_config(Path("config.yaml"))
check_config(CONFIG)


def page_of(*methods, **page):
    """The default config with both pipelines of some methods on two data sets."""
    config = copy.deepcopy(CONFIG)
    datasets = ["openfacts-zsre", "openfacts-counterfact"]
    grid_of = {"models": ["tiny-gptj"], "datasets": datasets, "methods": list(methods)}
    config["experiments"] = {mode: {"mode": mode} | grid_of for mode in ("batch", "consecutive")}
    config["figures"] = {}
    config["page"] |= page
    return Page(Reported(config, "results"))


def test_the_page_compares_pipelines_and_the_editor_it_looks_at_with_its_baseline():
    pairs = page_of("none", "full-c", "pac").pairs
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
    page = page_of("none", "full-c", "pac")
    fact = page.shown()["fact"]
    assert list(fact["folders"]) == ["PAC", "Full-C"]
    assert all("/openfacts-zsre/batch/" in folder for folder in fact["folders"].values())
    (paths,) = page.paths(None)
    assert paths.startswith("<results>/trace/tiny-gptj/openfacts-zsre/paths/")


def test_another_editor_can_be_looked_at_and_one_that_is_not_run_is_left_out():
    page = page_of("full-c", "rome", editor="rome")
    assert page.shown()["fact"]["editor"] == "ROME"
    assert page.paths(None) == []
    without = page_of("full-c", "rome")
    assert without.shown()["fact"] == {}
    assert without.paths(None) == []
    assert {pair["question"] for pair in without.pairs} == {"forgets"}


def test_the_page_shows_the_config_but_no_folder_of_this_machine():
    config = copy.deepcopy(CONFIG) | {"data_mirror": "/some/where"}
    shown = Page(Reported(config, "results")).shown()["config"]
    assert "/some/where" not in shown
    assert "experiments:" in shown
