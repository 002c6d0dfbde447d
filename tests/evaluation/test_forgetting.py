"""What became of edits, against answers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from kmebench.data.records import EditRequest
from kmebench.evaluation.forgetting import (
    again_later,
    between_groups,
    closest_later,
    fates,
    same_relation,
    same_subject,
)
from tests.evaluation.test_statistics import row


def test_an_edit_is_written_and_kept_lost_or_neither():
    wrong = {"after_ids": [1, 9]}  # half of the tokens right are not enough
    frame = pd.DataFrame(
        [
            row("0", "edit", when="write"),
            row("0", "edit"),
            row("1", "edit", when="write"),
            row("1", "edit", **wrong),
            row("2", "edit", when="write", **wrong),
            row("2", "edit"),  # a later edit brought it
            row("3", "edit"),  # its edit failed
            row("0", "edit", when="milestone", edits_done=1, **wrong),
            row("1", "paraphrase", when="write", **wrong),
        ]
    )
    assert list(fates(frame)["fate"]) == ["kept", "lost", "never written", "never written"]
    assert list(fates(frame)["case_id"]) == ["0", "1", "2", "3"]


def test_a_subject_or_a_relation_comes_again_only_if_it_comes_later():
    def request(i, subject, prompt, relation=None):
        return EditRequest(str(i), subject, prompt, "Rome", relation=relation)

    requests = [
        request(0, "France", "The capital of {} is"),
        request(1, "Spain", "The capital of {} is"),
        request(2, "FRANCE", "The king of {} is", "P35"),
        request(3, "Chile", "{} has the king", "P35"),
    ]
    assert again_later(requests, same_subject, 2).tolist() == [True, False]
    assert again_later(requests, same_subject, 1).tolist() == [False, False, False]
    assert again_later(requests, same_relation, 1).tolist() == [True, False, True]


def test_the_closest_of_the_keys_that_follow():
    keys = np.array([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0], [1.0, 0.0]])
    np.testing.assert_allclose(closest_later(keys, 2), [0.6, 0.8, np.nan, np.nan])
    np.testing.assert_allclose(closest_later(keys, 3), [1.0, np.nan, np.nan, np.nan])


def test_two_groups_differ_by_their_means_within_an_interval():
    values = np.array([1.0, 2.0, 6.0, 8.0, np.nan])
    first = np.array([False, False, True, True, True])
    mean, low, high = between_groups(values, first, resamples=500, seed=0)
    assert mean == pytest.approx(5.5)
    assert 4.0 <= low < mean < high <= 7.0
    assert np.isnan(between_groups(values, first & False, resamples=10, seed=0)).all()
