"""The numbers that README.md and docs/ quote, written from the reference results. No torch.

A quoted number stands between two comments, which a reader of the page does not see. The first
names the reference results, the run that it is computed from, and the metric::

    <!--= editors zsre/batch/pac score -->79.7 [76.1, 83.1]<!--/-->

``editors`` is reference/smollm2-135m-editors. Where a folder holds several models, one is
named: ``sizes/qwen2.5-coder-0.5b`` is that model in reference/sizes.

``a - b`` in place of the run is the paired difference of two runs. In place of the metric, ``n`` is
the number of edits, and ``forgotten`` the Efficacy now minus that right after each edit.
``score@100`` is the Score after 100 edits. All are of protocol ``token`` and, without ``@``, of the
final model, in percent, with 95% intervals. A table stands likewise between two comments:
its name in :data:`TABLES` and its folder. After a change of the reference results:

python -m kmebench.reporting.quotes
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from kmebench.editors.cards import registered
from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import metrics_of
from kmebench.io.files import write_text
from kmebench.modes import DEFAULT
from kmebench.planning import cost
from kmebench.planning.config import read_checked_config
from kmebench.reporting.findings import Runs
from kmebench.reporting.tables import markdown_table, shown_difference

REFERENCE = Path("reference")
PAGES = ("README.md", "docs/*.md", "reference/*/README.md")
MODEL = "smollm2-135m"
STATISTICS = {"resamples": 1000, "seed": 0}
_QUOTE = re.compile(r"(<!--= (?P<source>[^>]+) -->)(?P<shown>.*?)(<!--/-->)", re.DOTALL)


def filled(text: str) -> str:
    """Write every quoted number and table of a page anew.

    Raises:
        KMEBenchError: a quote names no run, metric or table.
    """
    return _QUOTE.sub(lambda found: f"{found[1]}{quote(found['source'])}{found[4]}", text)


def without_quotes(text: str) -> str:
    """Leave out what is quoted: the numbers that nothing computes remain."""
    return _QUOTE.sub("", text)


@cache
def quote(source: str) -> str:
    """Return what a quote shows."""
    match source.split():
        case [name, folder] if name in TABLES:
            return f"\n\n{TABLES[name](Path(folder))}\n\n"
        case [place, run, "n"]:
            return str(_runs(place).mean(_path(place, run), "efficacy")[3])
        case [place, run, "forgotten"]:
            return shown_difference(*_runs(place).forgotten(_path(place, run))[:3])
        case [place, run, metric] if metric.partition("@")[0] in _metrics():
            metric, _, edits = metric.partition("@")
            runs = _runs(place).after(int(edits)) if edits else _runs(place)
            mean, low, high, _ = runs.mean(_path(place, run), metric)
            return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
        case [place, a, "-", b, metric] if metric in _metrics():
            a, b = (_path(place, run) for run in (a, b))
            return shown_difference(*_runs(place).difference(a, b, metric)[:3])
    raise KMEBenchError(
        f"Nothing is quoted by {source!r}: name a folder, one or two runs, a metric."
    )


def _metrics() -> set[str]:
    return {metric.name for metric in metrics_of("request", tabled=True)}


@cache
def _runs(place: str) -> Runs:
    folder, _, model = place.partition("/")
    return Runs(REFERENCE / (folder if model else f"{MODEL}-{folder}"), STATISTICS)


def _path(place: str, run: str) -> str:
    """``zsre/batch/pac`` -> ``runs/smollm2-135m/zsre/batch/pac/default/seed0``."""
    model = place.partition("/")[2] or MODEL
    variant = "" if run.count("/") > 2 else f"/{DEFAULT}"
    return f"runs/{model}/{run}{variant}/seed0"


def scores(folder: Path) -> str:
    """Score of every method, by data set and pipeline."""
    tables = [pd.read_csv(folder / f"tables/table{number}.csv") for number in (1, 2)]
    scored = pd.concat(tables).query("variant == @DEFAULT and editor != 'original'")
    config = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    controls = {name for name, card in registered().items() if card.control}
    shown = {}
    for place, cells in scored.groupby(["dataset", "mode"]):
        cells = cells.set_index("editor")
        best = cells["score"].drop(controls, errors="ignore").max()
        shown[place] = {method: _score(cell, best) for method, cell in cells.iterrows()}
    places = [(d, m) for d in scored["dataset"].unique() for m in scored["mode"].unique()]
    heads = [f"{_NAMES[dataset]}, {mode}" for dataset, mode in places]
    rows = [
        [config["methods"][method]["label"], *(shown[place][method] for place in places)]
        for method in scored["editor"].unique()
    ]
    return markdown_table([["Editor", *heads], *rows])


_NAMES = {"zsre": "ZsRE", "counterfact": "CounterFact"}


def _score(cell: pd.Series, best: float) -> str:
    """One Score: bold if it is the best, ≈ if it cannot be told from the best."""
    mean = f"{cell['score']:.1f}"
    mean = f"**{mean}**" if cell["score"] == best else mean + "≈" * bool(cell["score_tied"])
    return f"{mean} [{cell['score_low']:.1f}, {cell['score_high']:.1f}]"


def differences(folder: Path) -> str:
    """Differences of Score in pairs of runs, by data set; bold where the interval has no zero."""
    table = pd.read_csv(folder / "comparisons/audit.csv").query("metric == 'score'")
    sets = list(table["dataset"].unique())
    rows = []
    for question, pair in table.groupby("question", sort=False):
        cells = {cell["dataset"]: _bold_difference(cell) for _, cell in pair.iterrows()}
        rows.append([str(question), *(cells[dataset] for dataset in sets)])
    return markdown_table([["A, or B", *sets], *rows])


def _bold_difference(cell: pd.Series) -> str:
    mean, _, interval = shown_difference(cell["difference"], cell["low"], cell["high"]).partition(
        " "
    )
    away = cell["low"] > 0 or cell["high"] < 0
    return f"**{mean}** {interval}" if away else f"{mean} {interval}"


def hours(folder: Path) -> str:
    """Device hours of config/paper.yaml by model and pipeline, scaled from finished runs."""
    config = read_checked_config(Path("config.yaml"), [Path("config/paper.yaml")])
    costs = cost.run_costs(config, cost.measurements([folder]))
    table = costs.pivot_table(
        "hours", "model", "mode", aggfunc="sum", margins=True, margins_name="all"
    )
    longest = costs.groupby("model")["hours"].max()
    table = table.assign(longest=longest).fillna({"longest": longest.max()})
    rows = [[str(model), *(f"{x:.0f}" for x in row)] for model, row in table.iterrows()]
    heads = [str(column).replace("_", " ") for column in table.columns]
    return markdown_table([["Hours", *heads[:-1], "longest run"], *rows])


def searches(folder: Path) -> str:
    """What every committed search of hyper-parameters took, and its Score there."""
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        for score, parts, values in _TAKEN.findall(path.read_text(encoding="utf-8")):
            rows.append([path.stem, score, *re.findall(r"[\d.]+", parts), values])
    return markdown_table(
        [["Search", "Score", "Efficacy", "Generality", "Locality", "Taken"], *rows]
    )


_TAKEN = re.compile(r"^# >  (.*?)  \((.*?)\)  .*?  (.*)$", re.MULTILINE)


TABLES: dict[str, Callable[[Path], str]] = {
    "scores": scores,
    "differences": differences,
    "hours": hours,
    "searches": searches,
}


def pages() -> list[Path]:
    """List the pages that quote numbers."""
    return [page for pattern in PAGES for page in sorted(Path().glob(pattern))]


if __name__ == "__main__":
    for page in pages():
        write_text(page, filled(page.read_text(encoding="utf-8")))
