"""The batch, the consecutive and the breadth-first pipeline."""

import pandas as pd
import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.errors import EditError, ModelError
from kmebench.pipelines.pipelines import (
    Setup,
    milestones,
    positions_asked,
    run_breadth_first,
    run_consecutive,
)
from tests.pipelines.runs import (
    SETTINGS,
    Counting,
    checkpoints,
    comparable,
    consecutive,
    in_batches,
)

PAC = {"trace_on": "current", "learning_rate": 5e-3, "steps": 8}


def test_every_batch_starts_from_the_original_model_and_from_no_memory(
    make_model, requests, tmp_path
):
    model, editor = make_model("gptj", torch.float32), Counting()
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    outcome = in_batches(model, editor, requests, 2, tmp_path / "a")
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    assert [call["requests"] for call in outcome.times] == [2, 1]
    assert editor.calls == 0
    alone = in_batches(model, Counting(), requests[2:], 2, tmp_path / "b").predictions
    second = outcome.predictions[outcome.predictions["batch"] == 1]
    assert second["when"].unique().tolist() == ["final"]
    assert second["position"].unique().tolist() == [2]
    assert len(alone) == len(second)


def weight_sum(model):
    """A measurement that tells every state of the edited weights from every other."""
    return {"sum": sum(layer.value.weight.double().sum().item() for layer in model.ffn)}


def test_health_is_measured_at_milestones_and_the_end_on_finished_models(
    make_model, requests, tmp_path
):
    four, seen = [*requests, requests[0]], []

    def measure(model):
        seen.append(model.parameter(model.ffn[1].value.weight_name).clone())
        return weight_sum(model)

    model = make_model("gptj", torch.float32)
    original = model.parameter(model.ffn[1].value.weight_name).clone()
    setup = Setup(model, Finishing(), SETTINGS, checkpoints(tmp_path / "a"), measure=measure)
    torch.manual_seed(0)
    outcome = run_consecutive(setup, four)
    assert [state["edits_done"] for state in outcome.health] == [1, 3, 4]
    assert all(torch.equal(weight, original + Finishing.change) for weight in seen)
    for state in outcome.health:  # what the finish adds counts as changed
        name, largest = model.ffn[1].value.weight_name, torch.linalg.svdvals(Finishing.change)[0]
        assert state["change"]["spectral"][name] == pytest.approx(float(largest), rel=1e-6)
        assert state["change"]["frobenius"][name] == pytest.approx(float(Finishing.change.norm()))
    assert outcome.health[-1]["sum"] != outcome.health[0]["sum"]
    plain = consecutive(make_model("gptj", torch.float32), Finishing(), four, tmp_path / "b")
    assert plain.health == []
    assert comparable(plain.predictions).equals(comparable(outcome.predictions))

    setup = Setup(model, Counting(), SETTINGS, checkpoints(tmp_path / "c"), measure=weight_sum)
    model.revert()
    assert [s["edits_done"] for s in run_breadth_first(setup, requests).health] == [3]


def test_measurements_survive_a_killed_run(make_model, requests, tmp_path):
    four = [*requests, requests[0]]

    def measured(folder, fail_at=None):
        saved, model = checkpoints(tmp_path / folder), make_model("gptj", torch.float32)
        setup = Setup(model, Counting(fail_at), SETTINGS, saved, measure=weight_sum)
        torch.manual_seed(0)
        return run_consecutive(setup, four).health

    with pytest.raises(KeyboardInterrupt):
        measured("killed", fail_at=3)
    assert measured("killed") == measured("whole")
    assert len(measured("whole")) == 3


class Unable(Counting):
    """Cannot edit Japan."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def edit(self, model, requests):
        delta = super().edit(model, requests)
        if requests[0].subject != "Japan":
            return delta
        if self.how == "nan":
            return WeightDelta({k: Dense(v.values * torch.nan) for k, v in delta.items()})
        raise self.how("the solve is singular")


@pytest.mark.parametrize("how", [EditError, ModelError, "nan"])
def test_an_edit_that_cannot_be_made_stops_the_run_or_is_left_out(
    how, make_model, requests, tmp_path
):
    with pytest.raises(EditError, match="singular" if how is EditError else "request 'b'"):
        consecutive(make_model("gptj", torch.float32), Unable(how), requests, tmp_path / "a")

    model, editor = make_model("gptj", torch.float32), Unable(how)
    torch.manual_seed(0)
    saved = checkpoints(tmp_path / "b")
    outcome = run_consecutive(Setup(model, editor, SETTINGS, saved, skip_failed=True), requests)
    assert [f["case_ids"] for f in outcome.failed] == [["b"]]
    assert editor.calls == 2  # its memory is as if it had not been asked
    assert [bool(norms) for norms in outcome.norms] == [True, False, True]
    final = outcome.predictions[outcome.predictions["when"] == "final"]
    assert final["position"].unique().tolist() == [0, 1, 2]
    assert saved.restore(make_model("gptj", torch.float32), Unable(how))[2].failed == outcome.failed

    setup = Setup(make_model("gptj", torch.float32), Unable(how), SETTINGS, saved)
    with pytest.raises(EditError, match=r"It was skipped before: .* delete .*/b "):
        run_consecutive(setup, requests)

    batches = in_batches(model, Unable(how), requests, 1, tmp_path / "c", skip_failed=True)
    assert [f["case_ids"] for f in batches.failed] == [["b"]]
    assert batches.predictions["position"].unique().tolist() == [0, 1, 2]


class Finishing(Counting):
    """Adds a large change to a weight that no edit touches, at the end of a run."""

    change = torch.linspace(-1, 1, 16 * 24).reshape(16, 24)

    def final_edit(self, model):
        return WeightDelta({model.ffn[1].value.weight_name: Dense(self.change)})


def test_what_an_editor_adds_at_the_end_is_evaluated_and_taken_back_before_the_run_goes_on(
    make_model, requests, tmp_path
):
    model = make_model("gptj", torch.float32)
    name = model.ffn[1].value.weight_name
    original = model.parameter(name).clone()
    finished = consecutive(model, Finishing(), requests, tmp_path / "a")
    plain = consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path / "b")
    differs = {
        when: comparable(frame).compare(
            comparable(plain.predictions[plain.predictions["when"] == when])
        )
        for when, frame in finished.predictions.groupby("when")
    }
    assert differs["write"].empty  # after edits 2 and 3 too: what edit 1 ended with is gone
    assert not differs["milestone"].empty
    assert not differs["final"].empty
    assert torch.equal(
        finished.edit.weights[name].dense(original.shape), original + Finishing.change - original
    )
    assert name not in plain.edit.weights
    assert "final_edit" in finished.times[-1]["seconds"]
    assert torch.equal(model.parameter(name), original)

    batches = in_batches(model, Finishing(), requests[:1], 1, tmp_path / "c")
    first = finished.predictions[finished.predictions["when"] == "milestone"]
    assert batches.predictions["ids"].tolist() == first["ids"].tolist()


def test_a_batch_is_evaluated_with_its_own_edits_only(trained, capital_requests, tmp_path):
    editor = build_editor("pac", PAC, {})
    both = in_batches(trained, editor, capital_requests[:4], 2, tmp_path / "a").predictions
    second = in_batches(trained, editor, capital_requests[2:4], 2, tmp_path / "b").predictions
    expected = both[both["batch"] == 1]["ids"].tolist()
    assert second["ids"].tolist() == expected


def test_consecutive_edits_accumulate_and_are_scored_when_written_and_at_the_end(
    make_model, requests, tmp_path
):
    model = make_model("gptj", torch.float32)
    original = model.parameter(model.ffn[0].value.weight_name).clone()
    outcome = consecutive(model, Counting(), requests, tmp_path)
    asked = outcome.predictions.groupby("when")["edits_done"].unique()
    assert asked["write"].tolist() == [1, 2, 3]
    assert asked["final"].tolist() == [3]
    assert asked["milestone"].tolist() == [1]
    final = outcome.predictions[outcome.predictions["when"] == "final"]
    assert final["position"].unique().tolist() == [0, 1, 2]
    assert final["free_ids"].notna().all()
    (name,) = outcome.edit.weights
    live = model.parameter(name)
    torch.testing.assert_close(live - original, outcome.edit.weights[name].dense(live.shape))


def test_breadth_first_edits_everything_at_once_and_keeps_it(make_model, requests, tmp_path):
    model, editor = make_model("gptj", torch.float32), Counting()
    original = model.parameter(model.ffn[0].value.weight_name).clone()
    outcome = run_breadth_first(Setup(model, editor, SETTINGS, checkpoints(tmp_path)), requests)
    assert editor.calls == 1
    assert [call["requests"] for call in outcome.times] == [3]
    assert outcome.predictions["when"].unique().tolist() == ["final"]
    assert outcome.predictions["position"].unique().tolist() == [0, 1, 2]
    assert outcome.predictions["edits_done"].unique().tolist() == [3]
    (name,) = outcome.edit.weights
    live = model.parameter(name)
    assert not torch.equal(live, original)
    torch.testing.assert_close(live - original, outcome.edit.weights[name].dense(live.shape))


def limited(model, rows, monkeypatch):
    """Let a model be trained on ``rows`` texts at once, and no more."""
    ask = model.answer_logits

    def answer_logits(batch, *behind):
        if torch.is_grad_enabled() and len(batch.counts) > rows:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return ask(batch, *behind)

    monkeypatch.setattr(model, "answer_logits", answer_logits)


#: With the rows that two requests take: PAC asks about both answers.
LIMITED = {
    "full-c": ({"steps": 3}, 2),
    "pac": ({"steps": 3, "paths": 2, "trace_on": "current"}, 4),
}


@pytest.mark.parametrize("name", LIMITED)
def test_out_of_memory_half_of_a_batch_is_edited_at_once(
    name, make_model, requests, tmp_path, monkeypatch, caplog
):
    hparams, rows_of_two = LIMITED[name]

    def run(micro_batch, folder, rows=None):
        model = make_model("gptj")
        editor = build_editor(name, hparams | {"micro_batch": micro_batch}, {})
        if rows:
            limited(model, rows, monkeypatch)
        return in_batches(model, editor, requests, 3, tmp_path / folder)

    expected = run(2, "a")
    found = run(4, "b", rows=rows_of_two)
    assert found.micro_batch == 2
    assert "out of memory while editing request 'a' (batch of 3): trying 2 at once" in caplog.text
    pd.testing.assert_frame_equal(comparable(found.predictions), comparable(expected.predictions))
    assert found.times[0]["steps"] == expected.times[0]["steps"]
    with pytest.raises(EditError, match=r"of 3\), 1 at once \(.*2.00 GiB\): lower micro_batch"):
        run(2, "c", rows=0.5)


class Tight(Counting):
    """Runs out of memory when it is done, but with one request at a time."""

    whole_micro_batch = 2

    def edit(self, model, requests):
        delta = super().edit(model, requests)
        if self.micro_batch > 1:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return delta


def test_the_second_try_has_the_memory_and_the_random_numbers_of_the_first(
    make_model, requests, tmp_path
):
    found = consecutive(make_model("gptj", torch.float32), Tight(), requests, tmp_path / "a")
    expected = consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path / "b")
    for name, part in expected.edit.weights.items():
        assert torch.equal(part.values, found.edit.weights[name].values)


class Broken(Counting):
    def edit(self, model, requests):
        name = model.ffn[0].value.weight_name
        return WeightDelta({name: Dense(torch.full(model.parameter(name).shape, float("nan")))})


def test_nan_never_reaches_the_weights(make_model, requests, tmp_path):
    model = make_model("gptj", torch.float32)
    with pytest.raises(EditError, match=r"edit of request 'a' .* holds NaN"):
        consecutive(model, Broken(), requests, tmp_path)
    assert model.parameter(model.ffn[0].value.weight_name).isfinite().all()


def test_milestones_are_ones_and_threes():
    assert sorted(milestones(300)) == [1, 3, 10, 30, 100]
    assert sorted(milestones(3000)) == [1, 3, 10, 30, 100, 300, 1000]
    assert milestones(1) == set()


def test_a_sample_of_the_edits_so_far_is_uniform_fixed_and_behind_them():
    assert positions_asked(1000, 30) == list(range(30))
    assert positions_asked(1000, 30, 300) == list(range(30))
    early, late = positions_asked(1000, 500, 100), positions_asked(1000, 1000, 100)
    assert len(set(early)) == len(set(late)) == 100
    assert late == positions_asked(1000, 1000, 100) != early
    assert max(early) < 500 <= max(late)
    # Each tenth of the edits holds about ten of the hundred.
    assert all(2 <= sum(i // 100 == tenth for i in late) <= 20 for tenth in range(10))


def test_a_milestone_asks_about_a_sample_and_the_end_about_all(make_model, requests, tmp_path):
    four = [*requests, requests[0]]
    model = make_model("gptj", torch.float32)
    setup = Setup(model, Counting(), SETTINGS, checkpoints(tmp_path))
    frame = run_consecutive(setup, four, milestone_sample=2).predictions
    asked = {
        (when, done): sorted(rows["position"].unique())
        for (when, done), rows in frame.groupby(["when", "edits_done"])
    }
    assert asked["milestone", 1] == [0]
    assert asked["milestone", 3] == positions_asked(4, 3, 2)
    assert asked["final", 4] == [0, 1, 2, 3]
    assert [asked["write", i] for i in (1, 2, 3, 4)] == [[0], [1], [2], [3]]
