"""One cell of the grid: which requests are edited, and in which order."""

import pytest
import torch

from kmebench.editors.base import Editor
from kmebench.edits.weights import WeightDelta
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup
from kmebench.pipelines.run import in_order, run_pipeline

EVALUATION = Settings(batch_size=8, wild_max_tokens=2)


class Listing(Editor):
    """Changes nothing and notes what it was asked."""

    def __init__(self):
        super().__init__(None, {})
        self.asked = []

    def edit(self, model, requests):
        self.asked += [r.case_id for r in requests]
        return WeightDelta({})


def asked(mode, seed, make_model, requests, folder):
    editor = Listing()
    checkpoints = Checkpoints(folder, 100, {})
    setup = Setup(make_model("gptj", torch.float32), editor, EVALUATION, checkpoints)
    run_pipeline(
        setup, requests, {"mode": mode, "seed": seed, "batch_size": 10, "milestone_sample": None}
    )
    return editor.asked


def test_seed_zero_keeps_the_order_of_the_data_set_and_others_shuffle_it(requests):
    assert in_order(requests, 0) == list(requests)
    shuffled = in_order(list(requests) * 3, 1)
    assert shuffled == in_order(list(requests) * 3, 1)
    assert shuffled != list(requests) * 3
    assert sorted(r.case_id for r in shuffled) == sorted(r.case_id for r in list(requests) * 3)


@pytest.mark.parametrize(("mode", "shuffles"), [("consecutive", True), ("batch", False)])
def test_only_consecutive_edits_are_shuffled(mode, shuffles, make_model, requests, tmp_path):
    kept = [r.case_id for r in requests]
    orders = [asked(mode, seed, make_model, requests, tmp_path) for seed in range(4)]
    assert orders[0] == kept
    assert any(order != kept for order in orders[1:]) == shuffles
