"""Choosing hyper-parameters from a sweep on development splits. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from kmebench.errors import ConfigError
from kmebench.experiments.grid import DEVELOPMENT


def search_table(metrics: pd.DataFrame, candidates: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Score every candidate: the mean over data sets of the token protocol's Score, in percent.

    ``candidates``: model, method, dataset, variant, seed and ``values`` (what is swept) of
    every run. Returns model, method, values and score, plus one column per metric; best first.

    Raises:
        ConfigError: a run is not on a development split.
    """
    reported = [c["dataset"] for c in candidates if not c["dataset"].endswith(DEVELOPMENT)]
    if reported:
        raise ConfigError(
            f"Hyper-parameters are never chosen on {reported[0]!r}, which tables report on; sweep "
            f"{reported[0] + DEVELOPMENT!r}."
        )
    final = metrics[(metrics["protocol"] == "token") & (metrics["moment"] == "final")]
    keys = ["model", "method", "variant"]
    means = final.groupby([*keys, "metric"])["value"].mean().unstack() * 100
    values = {(c["model"], c["method"], c["variant"]): c["values"] for c in candidates}
    rows = [
        {"model": model, "method": method, "values": chosen}
        | means.loc[model, method, variant][
            ["score", "efficacy", "generality", "locality"]
        ].to_dict()
        for (model, method, variant), chosen in values.items()
    ]
    return pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable")


def tuned_config(table: pd.DataFrame) -> str:
    """Return a config overlay with the best values of each model and method, as YAML.

    The search itself stands above it as comments.
    """
    lines = ["# Chosen on development splits, by the mean Score over data sets (percent):"]
    chosen: dict[str, Any] = {}
    for (model, method), rows in table.groupby(["model", "method"], sort=True):
        lines.append(f"# {model}, {method}:")
        for row in rows.to_dict("records"):
            swept = ", ".join(f"{key}={value}" for key, value in row["values"].items())
            lines.append(
                f"#   {row['score']:5.1f}  (efficacy {row['efficacy']:.1f}, generality "
                f"{row['generality']:.1f}, locality {row['locality']:.1f})  {swept}"
            )
        best = rows.iloc[0]["values"]
        chosen.setdefault(model, {"hparams": {}})["hparams"][method] = dict(best)
    return "\n".join(lines) + "\n" + yaml.safe_dump({"models": chosen}, sort_keys=False)
