"""Turns: consecutive editing that hands over several requests together."""

import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.errors import EditError
from kmebench.evaluation.frames import predicted_frame
from kmebench.evaluation.prompts import prompts_of
from kmebench.modes import in_turns, spell_mode, split_mode
from kmebench.pipelines.pipelines import Setup, run_consecutive
from kmebench.pipelines.run import run_pipeline
from kmebench.preemption import PreemptedError
from tests.pipelines.runs import SETTINGS, Counting, checkpoints, comparable
from tests.pipelines.test_resuming import Signalled


@pytest.fixture
def seven(requests):
    return [replace(r, case_id=f"{r.case_id}{i}") for i in range(3) for r in requests][:7]


def turns(model, editor, requests, turn, folder, every=1, **kwargs):
    torch.manual_seed(0)
    setup = Setup(model, editor, SETTINGS, checkpoints(folder, every), **kwargs)
    return run_consecutive(setup, requests, turn)


def by_hand(model, editor, requests, turn):
    """Edit and ask in plain words: what right after each turn, what at the end."""
    torch.manual_seed(0)
    asked = []

    def ask(first, last, decode):
        prompts = [p for i in range(first, last) for p in prompts_of(requests[i], i)]
        return predicted_frame(model, prompts, SETTINGS, decode=decode)

    for first in range(0, len(requests), turn):
        group = requests[first : first + turn]
        model.apply(editor(model, group).edit)
        asked.append(ask(first, first + len(group), decode=False))
    return pd.concat(asked, ignore_index=True), ask(0, len(requests), decode=True)


@pytest.mark.parametrize("turn", [1, 3, 10])
def test_turns_are_what_calls_of_the_editor_make_one_after_another(
    turn, make_model, seven, tmp_path
):
    found = turns(make_model("gptj", torch.float32), Counting(), seven, turn, tmp_path)
    wrote, final = by_hand(make_model("gptj", torch.float32), Counting(), seven, turn)
    for when, expected in (("write", wrote), ("final", final)):
        rows = found.predictions[found.predictions["when"] == when].reset_index(drop=True)
        assert comparable(rows[expected.columns]).equals(comparable(expected))
    sizes = {1: [1] * 7, 3: [3, 3, 1], 10: [7]}[turn]  # the last turn holds what is left
    assert [call["requests"] for call in found.times] == sizes


def test_all_so_far_are_asked_behind_the_turn_that_reaches_a_milestone(make_model, seven, tmp_path):
    def measured(turn):
        measure = lambda model: {"x": 0.0}  # noqa: E731
        model = make_model("gptj", torch.float32)
        outcome = turns(model, Counting(), seven, turn, tmp_path / str(turn), measure=measure)
        frame = outcome.predictions
        asked = frame[frame["when"] == "milestone"].groupby("edits_done")["position"].nunique()
        ends = frame[frame["when"] == "write"]["edits_done"].unique().tolist()
        return dict(asked), ends, [state["edits_done"] for state in outcome.health]

    assert measured(1) == ({1: 1, 3: 3}, [1, 2, 3, 4, 5, 6, 7], [1, 3, 7])
    assert measured(2) == ({2: 2, 4: 4}, [2, 4, 6, 7], [2, 4, 7])
    assert measured(4) == ({4: 4}, [4, 7], [4, 7])
    assert measured(7) == ({}, [7], [7])


#: Edits between two saved states -> what is saved when the second, third and fourth turn begins.
SAVED = {1: (2, 4, 6), 3: (0, 4, 6), 100: (0, 0, 0)}


@pytest.mark.parametrize("every", SAVED)
@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_run_killed_in_a_turn_goes_on_with_the_same_bytes(
    every, fail_at, make_model, seven, tmp_path
):
    def run(editor, folder):
        return turns(make_model("gptj", torch.float32), editor, seven, 2, tmp_path / folder, every)

    straight = run(Counting(), "a")
    with pytest.raises(KeyboardInterrupt):
        run(Counting(fail_at), "b")
    saved = SAVED[every][fail_at - 1]
    assert [path.name for path in (tmp_path / "b").glob("*")] == [str(saved)] * bool(saved)
    editor = Counting()
    resumed = run(editor, "b")
    assert comparable(resumed.predictions).equals(comparable(straight.predictions))
    assert resumed.norms == straight.norms
    assert editor.calls == 4  # the memory came from the checkpoint
    for name, part in straight.edit.weights.items():
        assert torch.equal(part.values, resumed.edit.weights[name].values)


def test_a_signal_ends_a_run_behind_its_turn(make_model, seven, tmp_path):
    def run(editor, folder):
        model = make_model("gptj", torch.float32)
        return turns(model, editor, seven, 3, tmp_path / folder, every=100)

    straight = run(Counting(), "a")
    with pytest.raises(PreemptedError, match="after 6 edits"):
        run(Signalled(signal.SIGTERM, at=2), "b")
    resumed = run(Signalled(signal.SIGTERM, at=0), "b")
    assert comparable(resumed.predictions).equals(comparable(straight.predictions))


class Unable(Counting):
    """Cannot edit a turn that holds a given request."""

    def edit(self, model, requests):
        delta = super().edit(model, requests)
        if any(r.case_id == "b1" for r in requests):
            raise EditError("singular")
        return delta


def test_a_turn_that_fails_is_left_out_as_a_whole_and_asked_all_the_same(
    make_model, seven, tmp_path
):
    model, editor = make_model("gptj", torch.float32), Unable()
    outcome = turns(model, editor, seven, 3, tmp_path, skip_failed=True)
    assert [f["case_ids"] for f in outcome.failed] == [["a1", "b1", "c1"]]
    assert [bool(norms) for norms in outcome.norms] == [True, False, True]
    assert editor.calls == 2  # as if it had not been asked
    wrote = outcome.predictions[outcome.predictions["when"] == "write"]
    assert wrote["position"].unique().tolist() == list(range(7))


def test_requests_of_a_turn_may_contradict_each_other(trained, capital_requests, tmp_path):
    """They reach the editor as they are, which finds a compromise or fails, as in a batch."""
    first, second = capital_requests[:2]
    other = replace(first, case_id="other", target_new=second.target_true)
    hparams = {"learning_rate": 1e-3, "norm_constraint": None, "steps": 5}
    outcome = turns(trained, build_editor("full-c", hparams, {}), [first, other], 2, tmp_path)
    trained.revert()
    assert [call["requests"] for call in outcome.times] == [2]
    final = outcome.predictions[outcome.predictions["when"] == "final"]
    assert set(final["case_id"]) == {first.case_id, "other"}


def test_a_mode_is_spelled_and_read_back():
    assert spell_mode("consecutive", 1) == "consecutive"
    assert spell_mode("consecutive", 50) == "consecutive+turn=50"
    for pipeline, turn in (("batch", 1), ("breadth_first", 1), ("consecutive", 50)):
        assert split_mode(spell_mode(pipeline, turn)) == (pipeline, turn)
    assert in_turns("consecutive") == in_turns("batch") == ""
    assert in_turns("consecutive+turn=50") == " in turns of 50"


@pytest.mark.parametrize(("mode", "sizes"), [("consecutive+turn=3", [3, 3, 1]), ("batch", [5, 2])])
def test_the_mode_of_a_run_says_its_turn(mode, sizes, make_model, seven, tmp_path):
    setup = Setup(make_model("gptj", torch.float32), Counting(), SETTINGS, checkpoints(tmp_path))
    found = run_pipeline(
        setup, seven, {"mode": mode, "seed": 0, "batch_size": 5, "milestone_sample": None}
    )
    assert [call["requests"] for call in found.times] == sizes
