"""Checkpoints: runs that end before their time go on with the same bytes."""

import os
import signal

import pandas as pd
import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_breadth_first
from kmebench.preemption import SIGNALS, PreemptedError, noted_signals
from tests.pipelines.runs import SETTINGS, Counting, comparable, consecutive, in_batches

EPOCHS = {
    "full-c": {"mini_batch": 2, "steps": 4, "tolerance": 0.0, "learning_rate": 1e-3},
    "ft-l": {"layer": 1, "mini_batch": 2, "steps": 4, "tolerance": 0.0},
    "ft-m": {"layer": 1, "mini_batch": 2, "steps": 4, "tolerance": 0.0},
    "locft-bf": {"layer": 1, "parameters": "layer", "mini_batch": 2, "steps": 4, "tolerance": 0.0},
    "pac-released": {"epochs": 4, "paths": 2, "learning_rate": 1e-3},
}


class Stopped(Checkpoints):
    """As if a signal came in epoch ``at``."""

    at = 0

    def save(self, model, editor, done, frames, outcome, stopped_by=None):
        super().save(model, editor, done, frames, outcome, "SIGTERM" if done == self.at else None)


@pytest.mark.parametrize("name", EPOCHS)
@pytest.mark.parametrize("family", ["gptj", "llama"])
@pytest.mark.parametrize("stop_at", [1, 2, 4])  # before and between scorings, and at the end
def test_breadth_first_goes_on_after_an_epoch_with_the_same_bytes(
    name, family, stop_at, make_model, requests, tmp_path
):
    def run(folder, at=0):
        torch.manual_seed(0)
        kept = Stopped(folder, 1, {"run": "one"}, "epochs")
        kept.at = at
        model = make_model(family, torch.float32)
        torch.manual_seed(1)
        editor = build_editor(name, EPOCHS[name], {})
        return run_breadth_first(Setup(model, editor, SETTINGS, kept), requests)

    straight = run(tmp_path / "a")
    with pytest.raises(PreemptedError, match=rf"Stopped by SIGTERM after {stop_at} epochs"):
        run(tmp_path / "b", stop_at)
    torch.manual_seed(5)  # the order of the mini-batches comes from the checkpoint
    resumed = run(tmp_path / "b")
    assert resumed.times[0]["steps"] == straight.times[0]["steps"]
    assert set(resumed.times[0]["seconds"]) == set(straight.times[0]["seconds"])
    pd.testing.assert_frame_equal(comparable(resumed.predictions), comparable(straight.predictions))
    for parameter, part in straight.edit.weights.items():
        for one, other in zip(
            part.factors(), resumed.edit.weights[parameter].factors(), strict=True
        ):
            assert torch.equal(one, other)


def test_a_signal_ends_breadth_first_after_its_epoch(make_model, requests, tmp_path, monkeypatch):
    editor = build_editor("pac-released", EPOCHS["pac-released"], {})
    step = editor._step

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.undo()
        step(*arguments)

    monkeypatch.setattr(editor, "_step", signalled)
    kept = Checkpoints(tmp_path, 1, {}, "epochs")
    with pytest.raises(PreemptedError, match="Stopped by SIGUSR1 after 1 epochs"):
        run_breadth_first(
            Setup(make_model("gptj", torch.float32), editor, SETTINGS, kept), requests
        )


@pytest.mark.parametrize("fail_at", [1, 2])
def test_resumed_session_equals_an_uninterrupted_one(fail_at, make_model, requests, tmp_path):
    straight = consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(fail_at), requests, tmp_path / "b")
    resumed_editor = Counting()
    resumed = consecutive(
        make_model("gptj", torch.float32), resumed_editor, requests, tmp_path / "b"
    )
    assert len(resumed.times) == len(requests)
    pd.testing.assert_frame_equal(comparable(resumed.predictions), comparable(straight.predictions))
    for name, part in straight.edit.weights.items():
        assert torch.equal(part.values, resumed.edit.weights[name].values)
    assert torch.equal(resumed_editor.calls, torch.tensor([3.0]))


def test_a_checkpoint_of_another_configuration_is_not_resumed(make_model, requests, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(2), requests, tmp_path)
    editor = Counting()
    consecutive(make_model("gptj", torch.float32), editor, requests, tmp_path, identity="other")
    assert editor.calls == 3  # all three edits were made anew


def test_only_the_newest_checkpoint_is_kept(make_model, requests, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(2), requests, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_half_written_checkpoint_is_ignored(make_model, requests, tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "record.json").write_text("{")
    assert len(consecutive(make_model("gptj"), Counting(), requests, tmp_path).times) == 3


@pytest.mark.parametrize(
    "name",
    ["masters.safetensors", "editor.safetensors", "predictions.parquet", "record.json", None],
)
def test_a_damaged_checkpoint_is_not_resumed(name, make_model, requests, tmp_path, caplog):
    straight = consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(2), requests, tmp_path / "b")
    (saved,) = (tmp_path / "b").iterdir()
    if name is None:
        (saved / "random.safetensors").unlink()
    else:
        content = bytearray((saved / name).read_bytes())
        content[len(content) * 2 // 3] ^= 1
        (saved / name).write_bytes(content)
    editor = Counting()
    afresh = consecutive(make_model("gptj", torch.float32), editor, requests, tmp_path / "b")
    assert editor.calls == 3
    assert "is damaged: deleting it" in caplog.text
    pd.testing.assert_frame_equal(comparable(afresh.predictions), comparable(straight.predictions))


class Signalled(Counting):
    """Is sent a signal while it makes its edit number ``at``."""

    def __init__(self, number, at):
        super().__init__()
        self.number, self.at, self.edits = number, at, 0

    def edit(self, model, requests):
        self.edits += 1
        if self.edits == self.at:
            os.kill(os.getpid(), self.number)
        return super().edit(model, requests)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("pipeline", ["batch", "consecutive"])
def test_a_run_that_is_asked_to_stop_saves_what_it_has_done_and_goes_on_later(
    pipeline, number, make_model, requests, tmp_path
):
    def run(editor, folder):
        model = make_model("gptj", torch.float32)
        if pipeline == "batch":
            return in_batches(model, editor, requests, 1, tmp_path / folder)
        return consecutive(model, editor, requests, tmp_path / folder, every=100)

    usual = signal.getsignal(number)
    straight = run(Counting(), "a")
    with pytest.raises(PreemptedError, match=f"Stopped by {number.name} after 2 edits"):
        run(Signalled(number, at=2), "b")
    assert signal.getsignal(number) is usual
    goes_on = Signalled(number, at=0)
    resumed = run(goes_on, "b")
    assert goes_on.edits == 1
    assert comparable(straight.predictions).equals(comparable(resumed.predictions))
    assert straight.norms == resumed.norms


def test_a_run_stopped_in_its_last_edit_saves_that_too(make_model, requests, tmp_path):
    model = make_model("gptj", torch.float32)
    with pytest.raises(PreemptedError, match="after 3 edits"):
        consecutive(model, Signalled(signal.SIGTERM, at=3), requests, tmp_path)
    goes_on = Signalled(signal.SIGTERM, at=0)
    outcome = consecutive(make_model("gptj", torch.float32), goes_on, requests, tmp_path)
    assert goes_on.edits == 0
    assert "final" in set(outcome.predictions["when"])


def test_a_second_signal_is_obeyed_as_usual():
    obeyed = []
    usual = signal.signal(signal.SIGUSR1, lambda *_: obeyed.append("second"))
    try:
        with noted_signals() as stopped_by:
            assert stopped_by() is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (stopped_by(), obeyed) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert obeyed == ["second"]
    finally:
        signal.signal(signal.SIGUSR1, usual)
