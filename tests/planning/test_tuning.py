"""Choosing hyper-parameters on development splits."""

import pandas as pd
import pytest
import yaml

from kmebench.errors import ConfigError
from kmebench.planning.tuning import search_table, tuned_config

SCORES = {  # (variant, data set): score; b is best on average, a on the first data set alone
    ("default", "x.development"): 0.9,
    ("default", "y.development"): 0.2,
    ("rate=2", "x.development"): 0.7,
    ("rate=2", "y.development"): 0.6,
}
VALUES = {"default": {"rate": 1}, "rate=2": {"rate": 2}}


def metrics(spread=0.1, steps=(1.0, 2.0)):
    """``spread``: half a 95% interval; ``steps``: of default and of rate=2."""
    rows = [
        {
            "model": "m",
            "method": method,
            "dataset": dataset,
            "variant": variant,
            "protocol": protocol,
            "when": when,
            "metric": metric,
            "value": score if protocol == "token" and when == "final" else 1 - score,
            "low": score - spread,
            "high": score + spread,
            "steps_per_call": steps[variant != "default"],
        }
        for (variant, dataset), score in SCORES.items()
        for method in ("edit", "original")
        for protocol in ("token", "wild")
        for when in ("final", "write")
        for metric in ("score", "efficacy", "generality", "locality")
    ]
    return pd.DataFrame(rows)


def candidates(suffix=".development"):
    return [
        {
            "model": "m",
            "method": "edit",
            "dataset": name + suffix,
            "variant": variant,
            "seed": 0,
            "values": values,
        }
        for variant, values in VALUES.items()
        for name in "xy"
    ]


def chosen(**kwargs):
    text = tuned_config(search_table(metrics(**kwargs), candidates()))
    return yaml.safe_load(text)["models"]["m"]["hparams"]["edit"]["rate"]


def test_the_best_mean_over_data_sets_is_chosen_and_the_search_is_kept():
    table = search_table(metrics(), candidates())
    assert table["score"].tolist() == pytest.approx([65, 55])
    # Two data sets of half-interval 10: standard errors of 5.1 each, of their mean 3.6.
    assert table["standard_error"].tolist() == pytest.approx([3.608, 3.608], abs=1e-3)
    text = tuned_config(table)
    assert yaml.safe_load(text) == {"models": {"m": {"hparams": {"edit": {"rate": 2}}}}}
    comments = [line for line in text.splitlines() if "±" in line]
    assert [line.split("±")[0] for line in comments] == ["# >  65.0 ", "#    55.0 "]
    assert comments[0].endswith("2.0 steps  rate=2")


def test_values_of_one_mode_are_kept_apart():
    text = tuned_config(search_table(metrics(), candidates()), "batch")
    assert yaml.safe_load(text) == {"models": {"m": {"hparams": {"edit": {"batch": {"rate": 2}}}}}}


def test_the_best_score_is_chosen_whatever_its_steps_and_of_equal_ones_the_shorter():
    assert chosen(spread=0.3, steps=(1.0, 9.0)) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORES, ("rate=2", "x.development"), 0.5)  # now both have 0.55
        assert chosen(steps=(1.0, 9.0)) == 1
        assert chosen(steps=(9.0, 1.0)) == 2


def test_nothing_is_tuned_on_what_tables_report():
    with pytest.raises(ConfigError, match=r"never chosen on 'x'.*sweep 'x.development'"):
        search_table(metrics(), candidates(suffix=""))
