"""One edited fact under the microscope: answers of every editor, and the paths by layer.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kmebench.editors.needs import Paths
from kmebench.evaluation.protocols import PROTOCOLS
from kmebench.io.headers import read_header
from kmebench.reporting.figure_tables import node_shares

#: Prompts that are shown of a record, by kind, with what they are called and how many at most.
SHOWN = {"edit": ("Edit", 1), "paraphrase": ("Paraphrase", 1), "locality": ("Neighbour", 2)}
_JUDGE = PROTOCOLS["wild"]  # of answers as text


@dataclass(frozen=True)
class Question:
    """A prompt of the record, by what it is called."""

    name: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What a model says, and whether it says what it should."""

    text: str
    right: bool


@dataclass(frozen=True)
class Fact:
    """A record whose edit succeeded, and what every model says about it.

    ``shares``: keys and values of every layer in the impact of T+, percent [L, 2]; empty for an
    editor without paths.
    """

    case_id: str
    target: str
    questions: tuple[Question, ...]
    before: tuple[Answer, ...]
    after: Mapping[str, tuple[Answer, ...]]
    shares: Sequence[Sequence[float]]


def look_at(
    frames: Mapping[str, pd.DataFrame], method: str, paths: str | Path | None
) -> Fact | None:
    """Take the first record that ``method`` edited with success; None if there is none.

    ``frames``: predictions of runs on the same records, by what readers see of the method. Answers
    are texts (protocol wild): where they were not asked for, there is no fact.
    """
    final = {name: frame[frame["when"] == "final"] for name, frame in frames.items()}
    own = final[method]
    asked = own[(own["kind"] == "edit") & own["wild_after"].notna()]
    right = [row for row in asked.to_dict("records") if _JUDGE.says_target(row)]
    if not right:
        return None
    fact = right[0]
    rows = {name: _rows(frame, fact["case_id"]) for name, frame in final.items()}
    mine = rows[method]
    return Fact(
        case_id=fact["case_id"],
        target=fact["target"],
        questions=tuple(Question(SHOWN[row["kind"]][0], row["prompt"]) for row in mine),
        before=tuple(_answer(row | {"wild_after": row["wild_before"]}) for row in mine),
        after={name: tuple(map(_answer, each)) for name, each in rows.items()},
        shares=_shares(paths, fact["case_id"]).round(3).tolist() if paths else [],
    )


def _rows(frame: pd.DataFrame, case_id: str) -> list[dict[str, Any]]:
    record = frame[frame["case_id"] == case_id]
    kept = [record[record["kind"] == kind].head(most) for kind, (_, most) in SHOWN.items()]
    return pd.concat(kept).to_dict("records")


def _answer(row: Mapping[str, Any]) -> Answer:
    judge = _JUDGE.unchanged if row["kind"] == "locality" else _JUDGE.says_target
    return Answer(row["wild_after"].strip(), bool(judge(row)))


def _shares(path: str | Path, case_id: str) -> np.ndarray:
    """Share of keys and values of every layer in the impact of T+ of one record, [L, 2]."""
    facts = read_header(path, Paths.form)["facts"]
    place = facts["case_ids"].index(case_id) // facts["settings"]["group"]
    return node_shares(path)[place].sum(axis=-1)
