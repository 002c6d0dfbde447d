"""The paper's numbers as typed here."""

import pandas as pd
import pytest

from kmebench.errors import DataError
from kmebench.reporting.paper import ORIGINAL, REPORTED, read_paper_table, score_discrepancies

BATCH = read_paper_table("resources/paper/table1.csv")
CONSECUTIVE = read_paper_table("resources/paper/table2.csv")


def cell(table, *names):
    found = table[(table[["model", "editor", "dataset"]] == list(names)).all(axis=1)]
    return found[list(REPORTED)].iloc[0].tolist()


def test_every_cell_of_the_two_tables_is_there():
    assert len(BATCH) == 2 * 8 * 2
    assert len(CONSECUTIVE) == 3 * 11 * 2
    assert set(CONSECUTIVE["model"]) == {"GPT-J (6B)", "Llama2 (7B)", "Llama3 (8B)"}
    for table in (BATCH, CONSECUTIVE):
        original = table["editor"] == ORIGINAL
        assert table.loc[original, "locality"].isna().all()
        assert table.loc[~original, list(REPORTED)].notna().all(axis=None)


def test_sampled_cells():
    assert cell(BATCH, "GPT-J (6B)", "Ours", "ZsRE") == [100, 93.22, 63.75, 85.66]
    assert cell(BATCH, "Llama3 (8B)", "AlphaEdit", "CounterFact") == [98.90, 67.88, 94.22, 87.00]
    assert cell(CONSECUTIVE, "Llama3 (8B)", "Ours", "CounterFact") == [93.53, 1.93, 7.11, 34.19]
    assert cell(CONSECUTIVE, "Llama2 (7B)", "MEMIT", "ZsRE") == [0.00, 0.03, 0.00, 0.01]


def test_score_is_the_mean_of_its_parts_but_for_the_cells_listed_here():
    assert score_discrepancies(BATCH).empty
    found = score_discrepancies(CONSECUTIVE).to_numpy().tolist()
    assert found == [["GPT-J (6B)", "R-ROME", "ZsRE", 39.96, 39.94]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.drop(columns="score"), "expected"),
        (lambda t: pd.concat([t, t[:1]]), "holds GPT-J .6B. / Original Model / ZsRE twice"),
        (lambda t: t.assign(efficacy=101.0), "outside 0 to 100"),
    ],
)
def test_a_typing_error_is_caught(change, complaint, tmp_path):
    change(BATCH).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match=complaint):
        read_paper_table(tmp_path / "table.csv")
