"""Does what the paper claims hold here? Every verdict with its numbers. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kmebench.evaluation.score import read_predictions
from kmebench.evaluation.statistics import (
    ENOUGH_EDITS,
    bootstrap,
    paired_difference,
    request_values,
    summarise,
)
from kmebench.io.checked_files import read_json
from kmebench.planning.claims import Claim
from kmebench.reporting.figure_tables import layer_shares
from kmebench.reporting.tables import markdown_table

HOLDS, FAILS, OPEN, SMALL = "holds", "does not hold", "undecided", "not testable at this scale"
NOT_RUN, FEW_RIVALS = "not run", "not testable without all rivals"
#: Of a claim about prompts that the data set here does not have.
NOT_ASKED = "not asked"
#: Of claims about time: runs share their machine, and a search chose the steps of each editor.
UNTESTED = "not tested"
#: Consecutive edits from which on a claim is judged at every milestone, and not at the end alone.
MANY = 100
#: Claims about time and paths do not depend on how many edits were made.
_WITHOUT_END = ("layers", "faster", "slowest")
#: A mean, the ends of its 95% interval, and the number of values.
Interval = tuple[float, float, float, int]


@dataclass(frozen=True)
class Verdict:
    """What was found: a sentence with its numbers, their number of edits, and a verdict."""

    found: str
    n: int
    verdict: str


class Runs:
    """Finished runs by folder, as they were after so many edits, or at their end.

    Predictions are read and scored once.
    """

    def __init__(
        self, results: str | Path, statistics: Mapping[str, int], edits: int | None = None
    ) -> None:
        self._results, self._statistics, self.edits = Path(results), statistics, edits
        self._frames: dict[str, pd.DataFrame] = {}
        self._values: dict[str, pd.DataFrame] = {}

    def after(self, edits: int) -> "Runs":
        """Return the same runs as they were after so many consecutive edits."""
        then = Runs(self._results, self._statistics, edits)
        then._frames = self._frames
        return then

    def predictions(self, folder: str) -> pd.DataFrame:
        """All predictions of a run."""
        if folder not in self._frames:
            self._frames[folder] = read_predictions(self._results / folder / "predictions.parquet")
        return self._frames[folder]

    def values(self, folder: str) -> pd.DataFrame:
        """case_id and metrics of prompts of every request that was asked (protocol token)."""
        if folder not in self._values:
            frame = self.predictions(folder)
            at_end = frame["when"] == "final"
            then = (frame["when"] == "milestone") & (frame["edits_done"] == self.edits)
            self._values[folder] = request_values(frame[then if self.edits else at_end], "token")
        return self._values[folder]

    def milestones(self, folders: Iterable[str]) -> list[int]:
        """Numbers of edits after which all of the runs were asked, from :data:`MANY` on."""
        asked = []
        for folder in folders:
            frame = self.predictions(folder)
            asked.append({*frame.loc[frame["when"] == "milestone", "edits_done"]})
        return sorted(int(n) for n in set.intersection(*asked) if n >= MANY)

    def difference(self, a: str, b: str, metric: str) -> Interval:
        """Mean of a − b in percentage points, its 95% paired interval, and n."""
        return self._points(self.values(a), self.values(b), metric)

    def mean(self, folder: str, metric: str) -> Interval:
        """Mean in percent, its 95% interval, and n; NaN of none without prompts for the metric."""
        summary = summarise(self.values(folder), **self._statistics).set_index("metric")
        if metric not in summary.index:
            return np.nan, np.nan, np.nan, 0
        found = summary.loc[metric]
        return 100 * found["value"], 100 * found["low"], 100 * found["high"], int(found["n"])

    def forgotten(self, folder: str) -> Interval:
        """Efficacy at the end minus right after each edit, in points, its interval, and n."""
        frame = self.predictions(folder)
        written = request_values(frame[frame["when"] == "write"], "token")
        return self._points(self.values(folder), written, "efficacy")

    def seconds(self, folder: str) -> np.ndarray:
        """Seconds of every call of the editor."""
        calls = read_json(self._results / folder / "timing.json")["calls"]
        return np.array([sum(call["seconds"].values()) for call in calls])

    def steps(self, folder: str) -> float:
        """Optimisation steps per call of the editor."""
        return float(read_json(self._results / folder / "timing.json")["steps_per_call"])

    def slower(self, a: str, b: str) -> Interval:
        """Seconds per call of a − b, its 95% paired interval, and the number of calls."""
        return self._interval(self.seconds(a) - self.seconds(b))

    def middle(self, path: str, start: float, stop: float) -> Interval:
        """Share of T+'s impact per layer: middle layers − others, in percentage points.

        The middle begins and ends at the borders of layers next to these shares of the depth.
        """
        shares = layer_shares(self._results / path)
        layers = shares.shape[1]
        middle = np.zeros(layers, dtype=bool)
        middle[round(start * layers) : round(stop * layers)] = True
        return self._interval(shares[:, middle].mean(axis=1) - shares[:, ~middle].mean(axis=1))

    def _points(self, a: pd.DataFrame, b: pd.DataFrame, metric: str) -> Interval:
        found = paired_difference(a, b, metric, **self._statistics)
        return 100 * found.mean, 100 * found.low, 100 * found.high, found.n

    def _interval(self, values: np.ndarray) -> Interval:
        mean, low, high = bootstrap(values, **self._statistics)
        return float(mean), float(low), float(high), len(values)


def judge(
    claim: Claim,
    sides: Mapping[str, str],
    names: Mapping[str, str],
    runs: Runs,
    absent: Sequence[str] = (),
) -> Verdict:
    """Decide one claim for one model and data set.

    ``sides``: file or run folder by role; ``names``: what readers see of them; ``absent``: rivals
    that did not run. A claim about prompts that the data set does not have is not judged. Fewer
    than :data:`ENOUGH_EDITS` edits decide nothing: their verdict says so. Where the paper made more
    edits than were made here, a verdict names the edits made here.
    """
    verdict = _judged(claim, sides, names, runs)
    if not verdict.n:
        return Verdict(f"no prompts for {claim.test['metric']}", 0, NOT_ASKED)
    if "editors" in claim.test:
        verdict = _among(verdict, [names[r] for r in sides if r != claim.test["method"]], absent)
    if verdict.n < ENOUGH_EDITS:
        return replace(verdict, verdict=f"too few edits ({verdict.n})")
    made = runs.edits or verdict.n
    if made < claim.edits and verdict.verdict in (HOLDS, FAILS, OPEN):
        return replace(verdict, verdict=f"{verdict.verdict} at {made} edits")
    return verdict


def _among(verdict: Verdict, rivals: Sequence[str], absent: Sequence[str]) -> Verdict:
    """Name the rivals; a lead that misses some of them decides nothing."""
    few = bool(absent) and verdict.verdict == HOLDS
    ran = f"{', '.join(rivals)}; without {', '.join(absent)}" if absent else f"all {len(rivals)}"
    found = f"{verdict.found}; rivals: {ran}"
    return replace(verdict, found=found, verdict=FEW_RIVALS if few else verdict.verdict)


def _judged(
    claim: Claim, sides: Mapping[str, str], names: Mapping[str, str], runs: Runs
) -> Verdict:
    test = claim.test
    kind, metric = test["kind"], test.get("metric", "")
    if kind in ("above", "below"):
        return _against_number(claim, sides, names, runs)
    if kind == "layers":
        gap = runs.middle(sides[test["method"]], test["from"], test["to"])
        return _signed("middle layers − others", gap, "points per layer")
    if kind == "faster":
        return _time(test["b"], test["a"], sides, names, runs)
    if kind == "slowest":
        seconds = {role: runs.seconds(folder).mean() for role, folder in sides.items()}
        rival = max((role for role in seconds if role != test["method"]), key=seconds.__getitem__)
        named = {**names, rival: f"{names[rival]} (the slowest other)"}
        return _time(test["method"], rival, sides, named, runs)
    if kind == "difference":
        gap = runs.difference(sides["a"], sides["b"], metric)
        return _signed(f"{names['a']} − {names['b']}", gap, f"points of {metric}")
    means = {role: runs.mean(folder, metric)[0] for role, folder in sides.items()}
    choose = max if kind == "best" else min
    rival = choose((role for role in means if role != test["method"]), key=means.__getitem__)
    a, b = (test["method"], rival) if kind == "best" else (rival, test["method"])
    gap = runs.difference(sides[a], sides[b], metric)
    return _signed(f"{names[a]} {means[a]:.1f} − {names[b]} {means[b]:.1f}", gap, "")


def _against_number(
    claim: Claim, sides: Mapping[str, str], names: Mapping[str, str], runs: Runs
) -> Verdict:
    test = claim.test
    found = {names[role]: runs.mean(folder, test["metric"]) for role, folder in sides.items()}
    sign = 1 if test["kind"] == "above" else -1
    # Both ends of each interval, as distances on the right side of the number.
    ends = np.array([[low, high] for _, low, high, _ in found.values()])
    ends = np.sort(sign * (ends - test["value"]), axis=1)
    n = min(n for *_, n in found.values())
    text = ", ".join(
        f"{k} {m:.1f} [{low:.1f}, {high:.1f}]" for k, (m, low, high, _) in found.items()
    )
    if (ends[:, 0] >= 0).all():
        return Verdict(text, n, HOLDS)
    if (ends[:, 1] < 0).any():
        # What many edits ruin, a few may leave whole.
        small = test["kind"] == "below" and (runs.edits or n) < claim.edits
        return Verdict(text, n, SMALL if small else FAILS)
    return Verdict(text, n, OPEN)


def _time(
    a: str, b: str, sides: Mapping[str, str], names: Mapping[str, str], runs: Runs
) -> Verdict:
    """Seconds and steps of two runs; they decide nothing."""
    gap = runs.slower(sides[a], sides[b])
    unit = f"s per edit, in {runs.steps(sides[a]):.1f} and {runs.steps(sides[b]):.1f} steps"
    return replace(_signed(f"{names[a]} − {names[b]}", gap, unit), verdict=UNTESTED)


def _signed(text: str, gap: Interval, unit: str) -> Verdict:
    mean, low, high, n = gap
    verdict = HOLDS if low > 0 else FAILS if high < 0 else OPEN
    return Verdict(f"{text}: {mean:+.2f} [{low:+.2f}, {high:+.2f}] {unit}".strip(), n, verdict)


def findings(
    claims: Sequence[Claim], cells: Sequence[Mapping[str, Any]], runs: Runs
) -> pd.DataFrame:
    """Judge every claim wherever it can be tested.

    ``cells``: claim (its id), model, dataset (labels), sides, names and absent, as :func:`judge`
    has them. Returns id, claim, where, paper, paper_edits, model, dataset, edits (made before it
    was asked), found, n (asked), verdict; one row without a model for a claim that no run tests.
    Of long runs there is a row for every milestone.
    """
    rows = []
    for claim in claims:
        about: dict[str, Any] = {"id": claim.id, "claim": claim.claim, "where": claim.where}
        about |= {"paper": claim.paper, "paper_edits": claim.edits or None}
        tested = [cell for cell in cells if cell["claim"] == claim.id]
        for cell in tested:
            place = {"model": cell["model"], "dataset": cell["dataset"]}
            for then in _times(claim, cell, runs):
                verdict = judge(claim, cell["sides"], cell["names"], then, cell["absent"])
                rows.append(about | place | {"edits": then.edits or verdict.n} | vars(verdict))
        if not tested:
            rows.append(about | {"model": None, "dataset": None, "edits": 0, "found": None, "n": 0})
            rows[-1] |= {"verdict": NOT_RUN}
    return pd.DataFrame(rows).astype({"paper_edits": "Int64"})


def _times(claim: Claim, cell: Mapping[str, Any], runs: Runs) -> list[Runs]:
    """Return the runs of a cell at the milestones of long consecutive ones, and at their end."""
    test = claim.test
    if test["kind"] in _WITHOUT_END or test["mode"] != "consecutive":
        return [runs]
    return [*map(runs.after, runs.milestones(cell["sides"].values())), runs]


_CAPTION = (
    "What the paper claims and what was found here. Protocol token, final model; differences with "
    "95% paired bootstrap intervals over edits, in percentage points (of times in seconds); means "
    "with 95% intervals that are exact at 0 and 100. A claim holds where the interval lies on its "
    "side of zero (or of the number it names), fails where it lies on the other, and is undecided "
    f"in between; from {ENOUGH_EDITS} edits on. Rivals are the editors of the paper's table: a "
    "lead holds only against all of them. Where the paper made more edits, a verdict names those "
    "made here, and ruin that fewer edits do not bring is not testable. Times test nothing: the "
    "machines did other work too, and searches chose how many steps an editor takes "
    "(docs/performance.md). Verdicts are not corrected for their number. Other models and fewer "
    "edits than the paper's limit what either says about the paper."
)


def findings_markdown(table: pd.DataFrame) -> str:
    """Render for people."""
    several = f"{_by_model(table)}\n\n" if table["model"].nunique() > 1 else ""
    lines = [["Claim", "Paper", "Model", "Data set", "Edits (paper)", "Found", "Verdict"]]
    for row in table.to_dict("records"):
        edits = f"{row['edits']}"
        if row["n"] != row["edits"]:
            edits += f", {row['n']} asked"
        if not pd.isna(row["paper_edits"]):
            edits += f" ({row['paper_edits']})"
        shown = [row["model"], row["dataset"], edits, row["found"]]
        cells = ["–" if pd.isna(x) else str(x) for x in shown]
        claim = f"{row['claim']} ({row['where']})"
        lines.append([claim, row["paper"], *cells, row["verdict"]])
    return f"**{_CAPTION}**\n\n{several}{markdown_table(lines)}\n"


def _by_model(table: pd.DataFrame) -> str:
    """Lay out the verdicts of every claim, model beside model."""
    tested = table.dropna(subset="model")
    numbered = tested["verdict"].str.cat(tested["edits"].astype(str), " (").add(")")
    cells = tested["verdict"].where(tested["verdict"].str.contains("edits"), numbered)
    rows = tested.assign(cell=cells).groupby(["claim", "model"], sort=False)["cell"].agg("; ".join)
    wide = rows.unstack().reindex(
        index=tested["claim"].unique(), columns=tested["model"].unique(), fill_value="–"
    )
    head = ["Claim (verdict, edits)", *wide.columns]
    return markdown_table([head, *([claim, *wide.loc[claim].fillna("–")] for claim in wide.index)])
