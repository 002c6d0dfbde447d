"""The paper's claims, and the runs of a config that can test them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kmebench.data.forms import paper_dataset
from kmebench.editors.needs import Paths
from kmebench.errors import DataError
from kmebench.modes import DEFAULT
from kmebench.planning import grid
from kmebench.planning.grid import Run

KINDS = ("best", "least", "difference", "above", "below", "faster", "slowest", "layers")
#: Kinds about all editors of a table of the paper.
AMONG_ALL = ("best", "least", "slowest")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: where it stands, its numbers, and the test that decides it.

    ``edits``: how many consecutive edits the paper made for it; 0 if that does not matter.
    """

    id: str
    claim: str
    where: str
    paper: str
    test: Mapping[str, Any]
    edits: int = 0


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims.

    Raises:
        DataError: names the file and the claim that has an unknown or missing key.
    """
    claims = []
    for number, record in enumerate(yaml.safe_load(Path(path).read_text(encoding="utf-8"))):
        try:
            claim = Claim(**record)
        except TypeError as error:
            raise DataError(f"{path}, claim {number}: {error}") from None
        if claim.test.get("kind") not in KINDS:
            raise DataError(f"{path}, claim {claim.id!r}: the kind of its test is none of {KINDS}.")
        if claim.test["kind"] in AMONG_ALL and "editors" not in claim.test:
            raise DataError(f"{path}, claim {claim.id!r}: its test has no editors to compare.")
        claims.append(claim)
    return claims


def cells_of(config: Mapping[str, Any], claim: Claim) -> list[tuple[str, str, dict[str, Run]]]:
    """Return (model, data set, runs by role) wherever the grid has all runs that a claim needs.

    The roles are the names of methods, or ``a`` and ``b``. A claim about all ``editors`` of a
    table needs one of its rivals: who is beaten by one is not the best, whoever else did not run.
    """
    planned = [run for run in grid.all_runs(config) if run.seed == config["seed"]]
    found = []
    for model, dataset in sorted({(run.model, run.dataset) for run in planned}):
        known = config["datasets"].get(dataset)  # a development split is no data set of the paper
        if known is None or paper_dataset(known["schema"]) != claim.test["dataset"]:
            continue
        here = [run for run in planned if (run.model, run.dataset) == (model, dataset)]
        sides = _sides(config, claim.test, model, here)
        if sides:
            found.append((model, dataset, sides))
    return found


def _sides(
    config: Mapping[str, Any], test: Mapping[str, Any], model: str, runs: Sequence[Run]
) -> dict[str, Run]:
    """The runs of one cell by role; empty if one is missing."""
    if test["kind"] == "layers":
        traced = [run for run in runs if grid.needed(config, run, Paths)]
        own = [r for r in traced if (r.method, r.variant) == (test["method"], DEFAULT)]
        return {test["method"]: own[0]} if own else {}
    of_mode = {(run.method, run.variant): run for run in runs if run.mode == test["mode"]}
    if test["kind"] == "difference":
        wanted = {}
        for side in ("a", "b"):
            method = test[side]["method"]
            if method not in config["methods"]:
                return {}
            hparams = test[side].get("hparams", {})
            wanted[side] = (method, grid.variant_name(config, model, method, test["mode"], hparams))
        return _all({side: of_mode.get(key) for side, key in wanted.items()})
    default = {method: run for (method, variant), run in of_mode.items() if variant == DEFAULT}
    if test["kind"] in AMONG_ALL:
        named = {method: config["methods"][method].get("paper_name") for method in default}
        rivals = [m for m, name in named.items() if name in test["editors"]]
        rivals = [m for m in rivals if named[m] != named.get(test["method"])]
        sides = {m: run for m, run in default.items() if m in (test["method"], *rivals)}
        return sides if test["method"] in sides and rivals else {}
    methods = test["methods"] if "methods" in test else [test["a"], test["b"]]
    return _all({method: default.get(method) for method in methods})


def absent(config: Mapping[str, Any], claim: Claim, sides: Mapping[str, Run]) -> list[str]:
    """Return the rivals of a claim that did not run, by the paper's names."""
    ran = {config["methods"][run.method].get("paper_name") for run in sides.values()}
    return [name for name in claim.test.get("editors", []) if name not in ran]


def _all(sides: dict[str, Run | None]) -> dict[str, Run]:
    return {k: v for k, v in sides.items() if v} if None not in sides.values() else {}
