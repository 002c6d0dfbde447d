"""Choosing hyper-parameters from a sweep on development splits. Imports no torch.

The candidate of the best mean Score is taken; of equal ones, that of the fewest optimisation steps
(steps, unlike seconds, are the same on a busy machine). Every editor has the same number of
candidates and the same records (docs/tuning.md), so luck favours none of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import yaml

from kmebench.errors import ConfigError
from kmebench.evaluation.protocols import METRICS
from kmebench.values import DEVELOPMENT


def search_table(metrics: pd.DataFrame, candidates: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Score every candidate: the mean over data sets of the token protocol's Score, in percent.

    ``candidates``: model, method, dataset, variant, seed and ``values`` (what is swept) of
    every run. Returns model, method, values, score, its standard_error (from the bootstrap
    interval), efficacy, generality, locality and steps (per call of the editor); best first, and
    of equal Scores the one of fewest steps.

    Raises:
        ConfigError: a run is not on a development split.
    """
    reported = [c["dataset"] for c in candidates if not c["dataset"].endswith(DEVELOPMENT)]
    if reported:
        raise ConfigError(
            f"Hyper-parameters are never chosen on {reported[0]!r}, which tables report on; sweep "
            f"{reported[0] + DEVELOPMENT!r}."
        )
    final = metrics[(metrics["protocol"] == "token") & (metrics["when"] == "final")]
    keys = ["model", "method", "variant"]
    means = final.groupby([*keys, "metric"])["value"].mean().unstack() * 100
    scores = final[final["metric"] == "score"].groupby(keys)
    # Data sets are independent; half a 95% interval is 1.96 standard errors.
    errors = scores.apply(lambda x: 100 * np.hypot.reduce((x["high"] - x["low"]) / 3.92) / len(x))
    steps = scores["steps_per_call"].mean()
    values = {(c["model"], c["method"], c["variant"]): c["values"] for c in candidates}
    rows = [
        {"model": key[0], "method": key[1], "values": chosen}
        | means.loc[key][["score", *METRICS["score"].parts]].to_dict()
        | {"standard_error": errors[key], "steps": steps[key]}
        for key, chosen in values.items()
    ]
    table = pd.DataFrame(rows).sort_values(["score", "steps"], ascending=[False, True])
    return table.reset_index(drop=True)


def tuned_config(table: pd.DataFrame, mode: str | None = None) -> str:
    """Return a config overlay with the chosen values of each model and method, as YAML.

    The values hold in one ``mode`` alone, or in all. The search itself stands above it as
    comments, what was chosen marked by ``>``.
    """
    lines = [
        "# Chosen on development splits: the best mean Score over data sets (percent); of equal",
        "# ones the one of fewest steps.",
    ]
    chosen: dict[str, Any] = {}
    for (model, method), rows in table.groupby(["model", "method"], sort=True):
        lines.append(f"# {model}, {method}:")
        taken = rows.index[0]
        for index, row in rows.iterrows():
            parts = ", ".join(f"{name} {row[name]:.1f}" for name in METRICS["score"].parts)
            swept = ", ".join(f"{key}={value}" for key, value in row["values"].items())
            lines.append(
                f"# {'>' if index == taken else ' '} {row['score']:5.1f} ± "
                f"{row['standard_error']:.1f}  ({parts})  "
                f"{row['steps']:.1f} steps  {swept}"
            )
        values = dict(rows.loc[taken, "values"])
        held = values if mode is None else {mode: values}
        chosen.setdefault(model, {"hparams": {}})["hparams"][method] = held
    return "\n".join(lines) + "\n" + yaml.safe_dump({"models": chosen}, sort_keys=False)
