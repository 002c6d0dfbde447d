"""What the numbers of a run say, in sentences that code makes. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kmebench.evaluation.statistics import ENOUGH_EDITS
from kmebench.reporting.tables import shown_difference

_NAMED = 4  # editors that a sentence lists


@dataclass(frozen=True)
class Headline:
    """One finding: what it is about, and a sentence for every model, data set and pipeline."""

    title: str
    sentences: tuple[str, ...]


def headlines(cells: pd.DataFrame, differences: pd.DataFrame) -> list[Headline]:
    """Say who is best, who forgets, and what the editor of interest reaches.

    ``cells`` is of :func:`kmebench.reporting.page_numbers.main_cells`. ``differences`` has a row
    per model, data set, pipeline and question (``forgets``: consecutive − batch; ``against``:
    ``editor`` − ``other``): difference of Scores, low, high (points), n. Cells of fewer than
    :data:`ENOUGH_EDITS` edits make no claim: if all are such, one sentence says so.
    """
    if cells.empty:
        return []
    judged = cells[(cells["n"] >= ENOUGH_EDITS) & ~cells["control"]]
    if judged.empty:
        sizes = sorted({str(n) for n in cells["n"]}, key=int)
        text = (
            f"Each cell holds {' or '.join(sizes)} edits. They show that the pipeline works. "
            f"They say nothing about editors, which takes {ENOUGH_EDITS} edits or more."
        )
        return [Headline("Too few edits to judge", (text,))]
    found = differences[differences["n"] >= ENOUGH_EDITS] if len(differences) else differences
    models = judged["model"].nunique()
    parts = [("Who is best", _best(judged, models))]
    if len(found):
        parts += [
            ("Who forgets", _forgets(found[found["question"] == "forgets"], models)),
            (_versus(found), _against(found[found["question"] == "against"], models)),
        ]
    return [Headline(title, tuple(lines)) for title, lines in parts if lines]


def _place(row: pd.Series, models: int, *, mode: bool = True) -> str:
    """Where a sentence holds, as its first words."""
    names = [row["model"]] * (models > 1) + [row["dataset"]] + [row["mode"]] * mode
    return ", ".join(names)


def _points(row: pd.Series) -> str:
    return shown_difference(*row[["difference", "low", "high"]])


def _best(cells: pd.DataFrame, models: int) -> list[str]:
    lines = []
    scored = cells.dropna(subset="score")  # a data set without paraphrases has no Score
    for _, cell in scored.groupby(["model", "dataset", "mode"], sort=False):
        if len(cell) < 2:
            continue
        best = cell.loc[cell["score"].idxmax()]
        near = cell["tied"] | (cell["score"] == best["score"])
        ties = list(cell.loc[near & (cell.index != best.name), "editor"])
        score = f"{best['score']:.1f} [{best['score_low']:.1f}, {best['score_high']:.1f}]"
        text = f"{best['editor']} has the best Score, {score}"
        lines.append(f"{_place(best, models)}: {text}; {_tied(ties)}. n\u00a0=\u00a0{best['n']}.")
    return lines


def _tied(ties: Sequence[str]) -> str:
    if not ties:
        return "all others score less"
    if len(ties) > _NAMED:
        return f"{len(ties)} others cannot be told from it"
    names = " and ".join(filter(None, [", ".join(ties[:-1]), ties[-1]]))
    return f"{names} cannot be told from it"


def _forgets(differences: pd.DataFrame, models: int) -> list[str]:
    lines = []
    for _, cell in differences.groupby(["model", "dataset"], sort=False):
        worst = cell.loc[cell["difference"].idxmin()]
        text = "no editor scores less in consecutive than in batch editing"
        if worst["high"] < 0:
            text = f"{worst['editor']} loses most from batch to consecutive editing, "
            text += f"{_points(worst)} points of Score"
        lines.append(f"{_place(worst, models, mode=False)}: {text}. n\u00a0=\u00a0{worst['n']}.")
    return lines


def _versus(differences: pd.DataFrame) -> str:
    pairs = differences[differences["question"] == "against"]
    return " against ".join(pairs.iloc[0][["editor", "other"]]) if len(pairs) else ""


def _against(differences: pd.DataFrame, models: int) -> list[str]:
    lines = []
    for _, row in differences.iterrows():
        clear = row["low"] > 0 or row["high"] < 0
        verb = "scores more than" if row["difference"] > 0 else "scores less than"
        text = f"{row['editor']} {verb if clear else 'cannot be told from'} {row['other']}"
        lines.append(
            f"{_place(row, models)}: {text}, {_points(row)} points. n\u00a0=\u00a0{row['n']}."
        )
    return lines
