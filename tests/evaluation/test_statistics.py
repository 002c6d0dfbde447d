"""Metrics against values worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import METRICS
from kmebench.evaluation.statistics import (
    SIGNIFICANT,
    as_edited,
    bootstrap,
    cohort_of,
    cohorts,
    enough_resamples,
    holm,
    mean_of,
    paired_difference,
    request_values,
    summarise,
)

NAN = float("nan")


def row(case_id, kind, **columns):
    """One prediction: target tokens 1 2, before 5 6, unless said otherwise."""
    defaults = {
        "case_id": case_id,
        "position": int(case_id),
        "kind": kind,
        "when": "final",
        "edits_done": 2,
        "batch": 0,
        "prompt": "p",
        "target": "Rome",
        "target_ids": [1, 2],
        "before_ids": [5, 6],
        "after_ids": [1, 2],
        "target_new_logprob_after": -1.0,
        "target_true_logprob_after": -2.0,
        "free_before_ids": [5, 6],
        "free_after_ids": [1, 2],
        "wild_before": "Paris",
        "wild_after": "Rome",
    }
    return defaults | columns


FRAME = pd.DataFrame(
    [
        row("0", "edit"),
        row("0", "paraphrase", after_ids=[1, 9], free_after_ids=[1, 9], wild_after="Romeo"),
        row("0", "paraphrase", after_ids=[9, 9], free_after_ids=[9, 9], wild_after="in Rome"),
        row("0", "locality", after_ids=[5, 9], free_after_ids=[5, 9], wild_after="the PARIS!"),
        row("0", "portability", after_ids=[1, 2]),
        row("1", "edit", after_ids=[9, 2], free_after_ids=[1, 2], target_true_logprob_after=-0.5),
        row("1", "paraphrase", after_ids=[1, 2], target_true_logprob_after=NAN),
        row("1", "locality", after_ids=[5, 6], free_after_ids=[5, 6], wild_after="London"),
    ]
)

# protocol -> (efficacy, generality, locality) of requests 0 and 1
BY_HAND = {
    "token": [(1.0, 0.25, 0.5), (0.5, 1.0, 1.0)],
    "exact": [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0)],
    "free": [(1.0, 0.0, 0.0), (1.0, 1.0, 1.0)],
    "wild": [(1.0, 0.0, 1.0), (1.0, 1.0, 0.0)],
    "probability": [(1.0, 1.0, 0.0), (0.0, NAN, 0.0)],
}


@pytest.mark.parametrize("protocol", BY_HAND)
def test_every_protocol_gives_the_values_worked_out_by_hand(protocol):
    values = request_values(FRAME, protocol)
    found = values[["efficacy", "generality", "locality"]].to_numpy()
    np.testing.assert_allclose(found, np.array(BY_HAND[protocol]))


def told(new, true, when):
    return {f"target_new_logprob{when}": new, f"target_true_logprob{when}": true}


def test_nothing_is_preferred_to_itself():
    """A record of ZsRE may want what is true; a broken model may say two targets alike."""
    asked = [
        told(-1.0, -1.0, "_before") | told(-0.5, -0.5, "_after"),  # one target
        told(-2.0, -1.0, "_before") | told(-0.5, -0.5, "_after"),  # two, one as bad as the other
        told(-2.0, -1.0, "_before") | told(-0.1, -0.5, "_after"),
    ]
    frame = pd.DataFrame([row(str(i), "edit", **numbers) for i, numbers in enumerate(asked)])
    values = request_values(frame, "probability")
    assert values["efficacy"].tolist() == pytest.approx([NAN, 0.0, 1.0], nan_ok=True)
    summary = summarise(values).set_index("metric")
    assert summary.loc["efficacy", ["value", "n"]].tolist() == [0.5, 2]
    unedited = frame.filter(regex="^(?!.*_(before|after))")
    unedited = as_edited(unedited.assign(**told([-1.0, -2.0, -2.0], [-1.0] * 3, "")))
    values = request_values(unedited, "probability")
    assert values["efficacy"].tolist() == pytest.approx([NAN, 0.0, 0.0], nan_ok=True)


def test_score_counts_requests_that_have_one_of_its_parts():
    values = sparse([1.0, 0.0]).assign(locality=NAN)
    values.loc[0, ["efficacy", "generality"]] = NAN
    summary = summarise(values).set_index("metric")
    assert summary["n"].to_dict() == {"efficacy": 19, "generality": 1, "score": 19}


def test_locality_compares_with_the_unedited_model_not_with_the_gold_answer():
    gold = row("0", "locality", target_ids=[1, 2], before_ids=[5, 6], after_ids=[1, 2])
    assert request_values(pd.DataFrame([gold]), "token")["locality"].item() == 0.0


def test_score_is_the_mean_of_its_three_parts():
    summary = summarise(request_values(FRAME, "token"), resamples=200).set_index("metric")
    assert summary.loc["efficacy", "value"] == 0.75
    assert summary.loc["generality", "value"] == 0.625
    assert summary.loc["locality", "value"] == 0.75
    assert summary.loc["score", "value"] == pytest.approx((0.75 + 0.625 + 0.75) / 3)
    assert summary["n"].to_dict() == {
        "efficacy": 2,
        "generality": 2,
        "locality": 2,
        "portability": 1,
        "score": 2,
    }


def test_the_unedited_model_has_no_locality_and_scores_the_mean_of_two():
    original = FRAME.drop(columns=["before_ids", "free_before_ids", "wild_before"]).rename(
        columns={
            "after_ids": "ids",
            "free_after_ids": "free_ids",
            "wild_after": "wild",
            "target_new_logprob_after": "target_new_logprob",
            "target_true_logprob_after": "target_true_logprob",
        }
    )
    for protocol, expected in BY_HAND.items():
        values = request_values(as_edited(original), protocol)
        assert values["locality"].isna().all()
        np.testing.assert_allclose(values["efficacy"], [e for e, _, _ in expected])
    summary = summarise(request_values(as_edited(original), "token")).set_index("metric")
    assert summary.loc["score", "value"] == pytest.approx((0.75 + 0.625) / 2)
    assert "locality" not in summary.index


def test_intervals_are_seeded_contain_the_mean_and_cover_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        draws = pd.DataFrame(generator.random((80, 4)) < 0.7, columns=list(BY_NAME)).astype(float)
        summary = summarise(draws, resamples=300, seed=trial).set_index("metric")
        low, high = summary.loc["efficacy", ["low", "high"]]
        assert low <= summary.loc["efficacy", "value"] <= high
        covered += low <= 0.7 <= high
    assert 50 <= covered <= 60  # 95% of 60 is 57
    pd.testing.assert_frame_equal(summarise(draws, seed=1), summarise(draws, seed=1))
    assert not summarise(draws, seed=1).equals(summarise(draws, seed=2))


BY_NAME = ("efficacy", "generality", "locality", "portability")


def constant(n, **parts):
    return pd.DataFrame({name: [value] * n for name, value in parts.items()})


@pytest.mark.parametrize("n", [1, 20, 50])
def test_what_is_always_right_may_be_wrong_the_next_time(n):
    """The ends are where n of n, or none, has a probability of 2.5%; of Score, composed of them."""
    right = constant(n, efficacy=1.0, generality=1.0, locality=1.0, portability=0.0)
    table = summarise(right).set_index("metric")[["low", "high"]]
    for name in (*METRICS["score"].parts, "score"):
        assert table.loc[name, "low"] ** n == pytest.approx(0.025)
        assert table.loc[name, "high"] == 1.0
    assert table.loc["portability", "low"] == 0.0
    assert (1 - table.loc["portability", "high"]) ** n == pytest.approx(0.025)
    untouched = constant(n, efficacy=0.0, generality=0.0, locality=1.0, portability=NAN)
    low, high = summarise(untouched).set_index("metric").loc["score", ["low", "high"]]
    reach = 1 - 0.025 ** (1 / n)
    assert (low, high) == pytest.approx(((1 - reach) / 3, (1 + 2 * reach) / 3))


def test_only_what_is_alike_at_an_edge_has_exact_ends():
    half = constant(30, efficacy=0.5, generality=1.0, locality=1.0, portability=NAN)
    table = summarise(half).set_index("metric")[["low", "high"]]
    assert table.loc["efficacy"].tolist() == [0.5, 0.5]  # of no share of requests
    assert table.loc["score"].tolist() == pytest.approx([2.5 / 3] * 2)
    some = half.assign(generality=[1.0] * 10 + [NAN] * 20)
    assert summarise(some).set_index("metric").loc["generality", "low"] ** 10 == pytest.approx(
        0.025
    )


def test_the_interval_of_score_knows_that_its_parts_go_together():
    """Efficacy and locality exclude each other: their sum never varies."""
    half = pd.DataFrame(
        {
            "efficacy": [1.0, 0.0] * 20,
            "generality": [0.5] * 40,
            "locality": [0.0, 1.0] * 20,
            "portability": [NAN] * 40,
        }
    )
    summary = summarise(half).set_index("metric")
    assert summary.loc["score", "high"] - summary.loc["score", "low"] < 1e-9
    assert summary.loc["efficacy", "high"] - summary.loc["efficacy", "low"] > 0.1


def test_times_of_asking_are_never_mixed():
    written = FRAME.assign(when="write")
    with pytest.raises(KMEBenchError, match="several times in a run"):
        request_values(pd.concat([FRAME, written]), "token")
    early, late = (FRAME.assign(when="milestone", edits_done=n) for n in (1, 3))
    with pytest.raises(KMEBenchError, match="several times in a run"):
        request_values(pd.concat([early, late]), "token")


def test_paired_differences_need_the_same_requests():
    values = request_values(FRAME, "token")
    assert paired_difference(values, values, "efficacy") == (0.0, 0.0, 0.0, 1.0, 2)
    better = values.assign(efficacy=values["efficacy"] + [0.1, 0.3])
    assert paired_difference(better, values, "efficacy")[0] == pytest.approx(0.2)
    with pytest.raises(KMEBenchError, match="only on the same requests"):
        paired_difference(values, values[:1], "efficacy")


def sparse(generality):
    """Twenty requests, of which two have paraphrases."""
    table = {"case_id": [str(i) for i in range(20)], "position": range(20)}
    table |= {"efficacy": [1.0] * 10 + [0.0] * 10, "locality": [1.0, 0.5] * 10}
    return pd.DataFrame(table).assign(generality=generality + [NAN] * 18, portability=NAN)


def test_a_difference_of_scores_is_that_of_the_scores_that_tables_show():
    """Each of two paraphrases counts for a sixth of Score, and not for a sixtieth."""
    a = sparse([1.0, 1.0])
    b = sparse([0.0, 0.0]).assign(efficacy=[1.0] * 14 + [0.0] * 6)
    shown = [summarise(x, resamples=10).set_index("metric").loc["score", "value"] for x in (a, b)]
    assert shown == pytest.approx([(0.5 + 1.0 + 0.75) / 3, (0.7 + 0.0 + 0.75) / 3])
    found, low, high, _, n = paired_difference(a, b, "score")
    assert found == pytest.approx(shown[0] - shown[1]) == pytest.approx(0.8 / 3)
    assert [mean_of(x, METRICS["score"]) for x in (a, b)] == pytest.approx(shown)
    # A sample holds one of the two paraphrases or both, or has no Score.
    picks = np.random.default_rng(0).integers(20, size=(1000, 20))
    whole = picks[(picks < 2).any(axis=1)]
    by_hand = (1 - ((whole >= 10) & (whole < 14)).mean(axis=1)) / 3
    assert (low, high) == pytest.approx(tuple(np.percentile(by_hand, [2.5, 97.5])))
    assert n == 20


def test_where_every_request_has_every_part_score_is_a_mean_of_requests():
    generator = np.random.default_rng(1)
    names = METRICS["score"].parts
    a, b = (
        sparse([1.0, 1.0]).assign(**{name: (generator.random(20) < p) * 1.0 for name in names})
        for p in (0.5, 0.8)
    )
    each = (a[list(names)].mean(axis=1) - b[list(names)].mean(axis=1)).to_numpy()
    found, low, high, *_ = paired_difference(a, b, "score")
    assert (found, low, high) == pytest.approx(bootstrap(each, resamples=1000, seed=0))


@pytest.mark.parametrize("metric", ["generality", "score"])
@pytest.mark.filterwarnings("error")
def test_a_difference_of_what_nobody_was_asked_is_one_of_no_requests(metric):
    bare = constant(30, efficacy=1.0, generality=NAN, locality=NAN).assign(case_id=range(30))
    found = paired_difference(bare, bare, metric)
    assert found.n == 0
    assert np.isnan(found[:4]).all()
    assert paired_difference(bare, bare, "efficacy") == (0.0, 0.0, 0.0, 1.0, 30)


def test_p_is_twice_the_share_of_samples_that_do_not_have_the_sign():
    a = constant(30, efficacy=1.0).assign(case_id=range(30))
    b = a.assign(efficacy=[0.0] * 6 + [2.0] + [1.0] * 23)  # sums of six and of minus one
    picks = np.random.default_rng(0).integers(30, size=(1000, 30))
    sums = ((picks < 6) * 1.0 - (picks == 6)).sum(axis=1)
    p = paired_difference(a, b, "efficacy").p
    assert p == pytest.approx(2 * (sums <= 0).mean())
    assert 0.01 < p < 0.2
    assert paired_difference(b, a, "efficacy").p == p
    assert paired_difference(a, a.assign(efficacy=0.0), "efficacy").p == 2 / 1000  # and not 0


def test_holm_is_the_step_down_that_he_published():
    """The i-th smallest of m times m − i + 1, never below the one before it, 1 at most."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, NAN, 0.3, 0.4]) == pytest.approx([0.03, NAN, 0.6, 0.6], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_with_enough_resamples_one_of_many_tests_can_be_significant_and_with_fewer_none():
    """The least p-value is that of a difference whose samples all have its sign.

    At one fewer, 2 m / α, it is α, and rounding decides.
    """
    assert enough_resamples(24) <= 1000 < enough_resamples(25)
    for tests in (1, 2, 3, 7, 24, 25, 60, 333):
        enough = enough_resamples(tests)
        for resamples, significant in ((enough, True), (enough - 2, False)):
            a = constant(20, efficacy=1.0).assign(case_id=range(20))
            p = paired_difference(a, a.assign(efficacy=0.0), "efficacy", resamples=resamples).p
            assert (holm([p] + [1.0] * (tests - 1))[0] < SIGNIFICANT) == significant


def test_cohorts_follow_each_group_of_edits_through_time():
    milestone = FRAME[FRAME["case_id"] == "0"].assign(when="milestone", edits_done=1)
    written = FRAME.assign(when="write")
    table = cohorts(pd.concat([FRAME, milestone, written]), "token")
    assert table[["edits_done", "cohort", "efficacy"]].to_numpy().tolist() == [
        [1, 1, 1.0],
        [2, 1, 1.0],
        [2, 3, 0.5],
    ]
    assert [cohort_of(n) for n in (1, 2, 3, 4, 10, 11, 30, 31, 101)] == [
        *(1, 3, 3, 10, 10, 30, 30, 100, 300)
    ]
