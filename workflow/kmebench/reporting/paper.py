"""The paper's published tables."""

from pathlib import Path

import pandas as pd

from kmebench.errors import DataError
from kmebench.evaluation.protocols import METRICS, table_columns

REPORTED = tuple(metric.name for metric in table_columns("request") if metric.in_paper)
COLUMNS = ["model", "editor", "dataset", *REPORTED]
ORIGINAL = "Original Model"
#: Consecutive edits behind the paper's numbers.
PAPER_EDITS = 3000
#: Two printed digits: a mean of three rounded numbers, rounded again.
ROUNDING = 0.0101


def read_paper_table(path: str | Path) -> pd.DataFrame:
    """Read one published table: percent, NaN where the paper has no number.

    Raises:
        DataError: the file lacks a column, holds a cell twice or a number outside 0 to 100.
    """
    table = pd.read_csv(path)
    if list(table.columns) != COLUMNS:
        raise DataError(f"{path} has the columns {list(table.columns)}, expected {COLUMNS}.")
    twice = table[table.duplicated(COLUMNS[:3])]
    if len(twice):
        raise DataError(f"{path} holds {' / '.join(twice.iloc[0][:3])} twice.")
    numbers = table[list(REPORTED)].stack().dropna()
    if not numbers.between(0, 100).all():
        raise DataError(f"{path} holds a percentage outside 0 to 100.")
    return table


def score_discrepancies(table: pd.DataFrame) -> pd.DataFrame:
    """List the cells whose published Score is not the mean of its parts within rounding.

    Returns model, editor, dataset, score, mean.
    """
    mean = table[list(METRICS["score"].parts)].mean(axis=1)  # skips NaN: two parts
    off = (table["score"] - mean).abs() > ROUNDING
    found = table.loc[off, ["model", "editor", "dataset", "score"]]
    return found.assign(mean=mean[off].round(2)).reset_index(drop=True)
