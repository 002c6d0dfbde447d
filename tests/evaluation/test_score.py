"""From prediction files to the tidy table of an experiment."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kmebench.errors import KMEBenchError
from kmebench.evaluation.frames import write_frame
from kmebench.evaluation.schema import ORIGINAL, PREDICTIONS
from kmebench.evaluation.score import behind_best, score_experiment, score_states
from tests.conftest import RUN


def predictions(when, edits_done, after):
    rows = []
    for position, ids in enumerate(after):
        for kind in ("edit", "paraphrase", "locality"):
            row = dict.fromkeys(PREDICTIONS.names)
            row |= {"case_id": str(position), "position": position, "kind": kind, "batch": 0}
            row |= {"prompt": "p", "target": "t", "when": when, "edits_done": edits_done}
            row |= {"target_ids": [1, 2], "before_ids": [3, 4], "after_ids": ids}
            rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture
def files(tmp_path):
    frame = pd.concat(
        [predictions("write", 1, [[1, 2], [1, 2]]), predictions("final", 2, [[1, 9], [1, 2]])]
    )
    write_frame(frame, PREDICTIONS, tmp_path / "run.parquet")
    rows = [dict.fromkeys(ORIGINAL.names) for _ in range(2)]
    for row, kind in zip(rows, ("edit", "paraphrase"), strict=True):
        row |= {"case_id": "0", "position": 0, "kind": kind, "prompt": "p", "target": "t"}
        row |= {"target_ids": [1, 2], "ids": [1, 4]}
    write_frame(pd.DataFrame(rows), ORIGINAL, tmp_path / "original.parquet")
    spent = {"seconds_per_edit": 1.5, "steps_per_call": 3.0, "failed_edits": 2}
    (tmp_path / "timing.json").write_text(json.dumps(spent))
    return tmp_path


def score(files):
    return score_experiment(
        "table2",
        [RUN],
        [files / "run.parquet"],
        [files / "timing.json"],
        [{"model": "m", "dataset": "d"}],
        [files / "original.parquet"],
        {"resamples": 20, "seed": 0},
    )


def value(table, **wanted):
    for column, content in wanted.items():
        table = table[table[column] == content]
    return table["value"].item()


def test_retention_and_write_time_stand_apart(files):
    table = score(files)
    at = {"method": "pac", "protocol": "token", "metric": "efficacy"}
    assert value(table, when="final", **at) == 0.75
    assert value(table, when="write", **at) == 1.0
    assert value(table, method="original", protocol="token", metric="efficacy") == 0.5
    spent = table.loc[
        table["method"] == "pac", ["seconds_per_edit", "steps_per_call", "failed_edits"]
    ]
    assert spent.drop_duplicates().to_numpy().tolist() == [[1.5, 3.0, 2.0]]


def test_milestones_are_scored_each_by_itself(files):
    frame = pd.concat(
        [
            predictions("milestone", 1, [[1, 2]]),
            predictions("milestone", 3, [[1, 9], [1, 2], [8, 9]]),
            predictions("final", 4, [[1, 2]] * 4),
        ]
    )
    write_frame(frame, PREDICTIONS, files / "run.parquet")
    table = score(files)
    at = {"method": "pac", "protocol": "token", "metric": "efficacy"}
    assert value(table, when="milestone", edits_done=1, **at) == 1.0
    assert value(table, when="milestone", edits_done=3, **at) == 0.5
    assert value(table, when="final", edits_done=4, **at) == 1.0


def test_what_was_written_last_stands_apart_in_long_runs(files, monkeypatch):
    answers = [[1, 2], [8, 9], [1, 9], [1, 2]]  # right, wrong, half, right
    frame = pd.concat(
        [
            *(predictions("write", done, [ids]) for done, ids in enumerate(answers, start=1)),
            predictions("milestone", 3, [[8, 9]] * 3),
            predictions("final", 4, [[8, 9]] * 4),
        ]
    )
    write_frame(frame, PREDICTIONS, files / "run.parquet")
    at = {"method": "pac", "protocol": "token", "metric": "efficacy"}
    assert "newest" not in set(score(files)["when"])  # all are
    monkeypatch.setattr("kmebench.evaluation.score.NEWEST", 2)
    table = score(files)
    assert value(table, when="newest", edits_done=3, **at) == 0.25
    assert value(table, when="newest", edits_done=4, **at) == 0.75
    assert value(table, when="write", **at) == 0.625


def test_every_run_is_compared_with_the_best_on_the_same_requests(files):
    good = predictions("final", 3, [[1, 2], [1, 2], [1, 9]])
    poor = predictions("final", 3, [[8, 2], [1, 2], [8, 9]])
    table = behind_best(
        [(RUN | {"method": "poor"}, poor), (RUN | {"method": "good"}, good)],
        {"resamples": 200, "seed": 0},
    )
    table = table[(table["protocol"] == "token") & (table["metric"] == "efficacy")]
    table = table.set_index("method")
    assert table.loc["good", ["behind", "behind_low", "behind_high"]].tolist() == [0, 0, 0]
    assert table.loc["poor", "behind"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert table.loc["poor", "behind_low"] == 0.0  # a sample of the second request alone
    assert table.loc["poor", "behind_high"] == 0.5
    assert np.isnan(table.loc["good", "behind_p"])  # it is not compared with itself


def answers(right, n=40):
    """Final predictions of which the first ``right`` edits are as wanted."""
    return predictions("final", n, [[1, 2] if i < right else [8, 9] for i in range(n)])


def test_each_more_rival_makes_it_harder_to_be_told_from_the_best():
    """Five of forty edits are a difference beside one rival, and none beside eleven."""
    best, near = (RUN | {"method": "a"}, answers(30)), (RUN | {"method": "b"}, answers(25))
    others = [(RUN | {"method": f"c{k}"}, answers(25)) for k in range(10)]
    p = {}
    for finals in ([best, near], [best, near, *others]):
        table = behind_best(finals, {"resamples": 1000, "seed": 0})
        at = (table["protocol"] == "token") & (table["metric"] == "efficacy")
        p[len(finals)] = table[at].set_index("method")["behind_p"]["b"]
    assert p[2] < 0.05
    assert p[12] == pytest.approx(11 * p[2])
    assert p[12] > 0.05


@pytest.mark.parametrize("rivals", [3, 30])
def test_a_clear_difference_is_one_among_any_number_of_rivals(rivals):
    """A hundred resamples are enough for two rivals; all draws of the worst one have one sign."""
    others = [(RUN | {"method": f"c{k}"}, answers(40)) for k in range(rivals - 1)]
    finals = [(RUN | {"method": "best"}, answers(40)), (RUN | {"method": "worst"}, answers(0))]
    table = behind_best([*finals, *others], {"resamples": 100, "seed": 0})
    at = (table["protocol"] == "token") & (table["metric"] == "efficacy")
    p = table[at].set_index("method")["behind_p"]
    assert p["worst"] < 0.05
    assert p["c0"] == 1


def test_an_exact_tie_with_the_best_is_no_difference():
    finals = [(RUN | {"method": name}, answers(30)) for name in ("a", "b")]
    table = behind_best(finals, {"resamples": 200, "seed": 0})
    at = (table["protocol"] == "token") & (table["metric"] == "score")
    assert table[at].set_index("method").loc["b", ["behind", "behind_p"]].tolist() == [0, 1]


def test_the_best_score_is_the_one_that_tables_show():
    """One request has a paraphrase: right for one editor alone, whose edits are worse."""

    def of(edits, paraphrase):
        frame = predictions("final", 4, [[1, 2] if right else [8, 9] for right in edits])
        kept = frame[(frame["kind"] == "edit") | (frame["position"] == 0)].copy()
        (row,) = kept.index[kept["kind"] == "paraphrase"]
        kept.at[row, "after_ids"] = [1, 2] if paraphrase else [8, 9]
        return kept

    finals = [
        (RUN | {"method": "writes"}, of([0, 1, 1, 1], 0)),  # mean of requests 9/12, Score 3/12
        (RUN | {"method": "generalises"}, of([0, 0, 0, 1], 1)),  # mean of requests 4/12, Score 5/12
    ]
    table = behind_best(finals, {"resamples": 20, "seed": 0})
    at = (table["protocol"] == "token") & (table["metric"] == "score")
    behind = table[at].set_index("method")["behind"]
    assert behind.to_dict() == pytest.approx({"writes": 2 / 12, "generalises": 0.0})


def test_other_models_and_data_sets_are_no_rivals(files):
    good, poor = (predictions("final", 1, [ids]) for ids in ([1, 2], [8, 9]))
    for key in ("model", "dataset"):
        finals = [(RUN | {key: "other"}, good), (RUN, poor)]
        table = behind_best(finals, {"resamples": 5, "seed": 0})
        assert (table["behind"].dropna() == 0).all()


def test_a_control_is_nobodys_rival(files):
    """It keeps all of Locality; the best editor is the best of those that edit."""
    kept = predictions("final", 2, [[3, 4], [3, 4]])
    write_frame(kept, PREDICTIONS, files / "none.parquet")
    table = score_experiment(
        "table2",
        [RUN | {"method": "none"}, RUN],
        [files / "none.parquet", files / "run.parquet"],
        [files / "timing.json"] * 2,
        [],
        [],
        {"resamples": 20, "seed": 0},
        controls=["none"],
    )
    at = {"when": "final", "protocol": "token", "metric": "locality"}
    assert value(table, method="none", **at) == 1.0
    final = table[(table["metric"] == "locality") & (table["when"] == "final")]
    behind = final.set_index(["protocol", "method"])["behind"]
    assert behind["token", "pac"] == 0.0
    assert behind.xs("none", level="method").isna().all()


STATES = [
    {"edits_done": done, "tokens": 60, "perplexity": 10.0 * ratio, "perplexity_ratio": ratio}
    | {"nll_difference": 0.5, "kl": 0.25, "same_argmax": 0.75}
    for done, ratio in ((1, 1.0), (2, 3.0))
]


def test_states_are_scored_beside_requests(files):
    (files / "health.json").write_text(json.dumps(STATES))
    arguments = (["run.parquet"], ["timing.json"])
    table = score_experiment(
        "table2",
        [RUN],
        *([files / name for name in names] for names in arguments),
        [],
        [],
        {"resamples": 20, "seed": 0},
        [files / "health.json"],
    )
    states = table[table["protocol"] == "health"]
    at = {"metric": "perplexity_ratio"}
    assert value(states, when="milestone", edits_done=1, **at) == 1.0
    assert value(states, when="final", edits_done=2, **at) == 3.0
    assert value(states, when="final", metric="kl") == 0.25
    assert set(states["n"]) == {60}
    assert states[["low", "high", "behind"]].isna().all(axis=None)
    without = table[table["protocol"] != "health"].reset_index(drop=True)
    alone = score(files)
    alone = alone[alone["method"] != "original"].reset_index(drop=True)
    pd.testing.assert_frame_equal(without, alone, check_dtype=False)


def test_a_measurement_of_another_version_is_named(files):
    for state in STATES:
        (files / "health.json").write_text(json.dumps([{**state, "kl": 0.1}]))
        score_states(files / "health.json")
        old = {name: number for name, number in state.items() if name != "kl"}
        (files / "health.json").write_text(json.dumps([old]))
        with pytest.raises(KMEBenchError, match=r"health\.json has no 'kl'; it was made by"):
            score_states(files / "health.json")


def test_protocols_that_were_not_run_give_no_numbers(files):
    assert set(score(files)["protocol"]) == {"token", "exact"}


def test_a_file_of_another_version_is_named(files):
    table = pq.read_table(files / "run.parquet")
    pq.write_table(table.drop_columns(["after_ids"]), files / "run.parquet")
    with pytest.raises(KMEBenchError, match=r"run\.parquet has no column 'after_ids'"):
        score(files)
    column = pa.array(["x"] * table.num_rows)
    index = table.schema.get_field_index("after_ids")
    pq.write_table(table.set_column(index, "after_ids", column), files / "run.parquet")
    with pytest.raises(KMEBenchError, match=r"run\.parquet: the column 'after_ids' is string"):
        score(files)


def test_the_published_schema_lists_the_columns_of_the_files():
    with open("workflow/schemas/predictions.schema.yaml", encoding="utf-8") as stream:
        schema = yaml.safe_load(stream)
    assert list(schema["properties"]) == PREDICTIONS.names
    assert all("description" in column for column in schema["properties"].values())
    kinds = {"integer": pa.int32(), "string": pa.string(), "number": pa.float32()}
    for name, column in schema["properties"].items():
        kind = column["type"] if isinstance(column["type"], str) else column["type"][0]
        expected = pa.list_(pa.int32()) if kind == "array" else kinds[kind]
        assert PREDICTIONS.field(name).type == expected
