"""Checkpoints: runs that end before their time go on with the same bytes."""

import builtins
import errno
import io
import os
import re
import signal
from functools import partial
from random import Random

import pandas as pd
import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.evaluation.frames import write_frame
from kmebench.evaluation.schema import NORMS
from kmebench.pipelines.checkpoints import Checkpoints, Outcome, norms_frame
from kmebench.pipelines.pipelines import Setup, run_breadth_first, run_consecutive
from kmebench.preemption import SIGNALS, PreemptedError, noted_signals
from tests.pipelines.runs import (
    SETTINGS,
    Counting,
    checkpoints,
    comparable,
    consecutive,
    in_batches,
    same_tensors,
)

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

    def save(self, model, editor, done, frames, outcome, stopped_by):
        signal = "SIGTERM" if done == self.at else None
        super().save(model, editor, done, frames, outcome, lambda: signal)


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


class Tight(Checkpoints):
    """As if memory ran out behind the first epoch, once."""

    full = False

    def save(self, model, editor, done, *rest):
        super().save(model, editor, done, *rest)
        if not self.full:
            self.full = True
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def test_the_second_try_replaces_the_epochs_that_the_first_has_saved(
    make_model, requests, tmp_path
):
    def run(micro_batch, kept):
        torch.manual_seed(1)
        editor = build_editor("full-c", EPOCHS["full-c"] | {"micro_batch": micro_batch}, {})
        setup = Setup(make_model("gptj", torch.float32), editor, SETTINGS, kept)
        return run_breadth_first(setup, requests)

    expected = run(2, Checkpoints(tmp_path / "a", 1, {}, "epochs"))
    found = run(4, Tight(tmp_path / "b", 1, {}, "epochs"))
    assert found.micro_batch == 2
    assert found.times[0]["steps"] == expected.times[0]["steps"]
    assert comparable(found.predictions).equals(comparable(expected.predictions))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["4"]


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


def stopped_at(edits, identity, make_model, requests, folder):
    """Be killed in the edit after ``edits``; return how many were made."""
    editor = Signalled(signal.SIGTERM, at=0)
    editor.fail_at = edits
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), editor, requests, folder, identity=identity)
    return editor.edits - 1


def test_a_checkpoint_of_another_configuration_is_set_aside_and_goes_on_when_that_comes_back(
    make_model, requests, tmp_path, caplog
):
    one, other = ({"settings": {"a": a, "same": 1}, "inputs": a} for a in (1, 2))
    run = partial(stopped_at, make_model=make_model, requests=requests, folder=tmp_path)
    assert run(2, one) == 2
    assert run(1, other) == 1
    assert "configuration (run.inputs, run.settings.a differ) and stays" in caplog.text
    own, aside = sorted(tmp_path.iterdir())
    assert own.name == "1"
    assert aside.name.startswith("set-aside-2-")
    assert run(2, one) == 0
    own, aside = sorted(tmp_path.iterdir())
    assert own.name == "2"
    assert aside.name.startswith("set-aside-1-")
    assert run(2, other) == 1  # behind the first
    # The run is complete; a state of another one is not its to remove.
    consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path, identity=other)
    checkpoints(tmp_path, identity=other).clear()
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("set-aside-2-")
    assert run(2, one) == 0
    checkpoints(tmp_path, identity=one).clear()
    assert not tmp_path.exists()


def test_of_other_configurations_that_with_most_edits_is_kept(
    make_model, requests, tmp_path, caplog
):
    run = partial(stopped_at, make_model=make_model, requests=requests, folder=tmp_path)
    run(2, "most")
    run(1, "few")
    run(1, "now")
    assert "of other configurations one is kept" in caplog.text
    assert [path.name[:11] for path in sorted(tmp_path.iterdir())] == ["1", "set-aside-2"]
    assert run(2, "most") == 0


def test_only_the_newest_checkpoint_is_kept(make_model, requests, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(2), requests, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_norms_are_a_table_with_the_bits_that_they_have_in_memory(make_model, tmp_path):
    """Of 32 layers after 300 edits; as indented JSON they took 63 bytes each."""
    random = Random(0)
    call = {"requests": 1, "steps": 1, "seconds": {"solve": 0.1}}
    layers = [f"model.layers.{layer}.mlp.{w}.weight" for layer in range(32) for w in ("up", "down")]
    norms = [{name: random.random() for name in layers} for _ in range(299)]
    outcome = Outcome(times=[call] * 300, norms=[*norms[:100], {}, *norms[100:]])
    model, kept = make_model("gptj", torch.float32), checkpoints(tmp_path / "kept")
    kept.save(model, Counting(), 300, [], outcome)
    _, _, restored = kept.restore(model, Counting())
    assert restored.norms == outcome.norms  # to the last bit
    for name, found in (("straight", outcome), ("resumed", restored)):
        write_frame(norms_frame(found), NORMS, tmp_path / name)
    assert (tmp_path / "straight").read_bytes() == (tmp_path / "resumed").read_bytes()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "kept" / "300").iterdir()}
    assert sizes["norms.parquet"] < 12 * 299 * 64
    assert sizes["outcome.json"] < 300 * 60
    assert sizes["record.json"] < 2000


def test_a_half_written_checkpoint_is_ignored(make_model, requests, tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "record.json").write_text("{")
    assert len(consecutive(make_model("gptj"), Counting(), requests, tmp_path).times) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("masters.safetensors", "editor.safetensors", "predictions.parquet"),
        *("norms.parquet", "outcome.json", "record.json", None),
    ],
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


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["record.json", "masters.safetensors", None])
def test_a_checkpoint_that_cannot_be_read_stays(
    name, number, make_model, requests, tmp_path, monkeypatch
):
    with pytest.raises(KeyboardInterrupt):
        consecutive(make_model("gptj", torch.float32), Counting(2), requests, tmp_path)
    away = tmp_path / "2" / name if name else tmp_path
    whole = {"open": io.open, "listdir": os.listdir, "scandir": os.scandir}

    def refusing(read):
        def refuse(path, *arguments, **options):
            if os.fspath(path) == str(away):
                raise OSError(number, os.strerror(number), path)
            return read(path, *arguments, **options)

        return refuse

    with monkeypatch.context() as patch:
        for read in ("listdir", "scandir"):
            patch.setattr(os, read, refusing(whole[read]))
        for module in (io, builtins):
            patch.setattr(module, "open", refusing(whole["open"]))
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            consecutive(make_model("gptj", torch.float32), Counting(), requests, tmp_path)
    goes_on = Signalled(signal.SIGTERM, at=0)
    consecutive(make_model("gptj", torch.float32), goes_on, requests, tmp_path)
    assert goes_on.edits == 1


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


@pytest.mark.parametrize("name", ["consecutive", "breadth_first", *EPOCHS])
@pytest.mark.parametrize("how", ["killed", signal.SIGTERM])
def test_a_run_that_ends_in_its_final_evaluation_has_no_edit_to_make_again(
    name, how, make_model, requests, tmp_path
):
    calls = []

    def run(folder, ends_at):
        model, measured = make_model("gptj", torch.float32), []
        editor = build_editor(name, EPOCHS[name], {}) if name in EPOCHS else Counting()
        whole = editor.edit
        editor.edit = lambda *given: (calls.append(folder), whole(*given))[1]

        def measure(edited):
            measured.append(edited)
            if len(measured) == ends_at:
                if how == "killed":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), how)
            return {"sum": float(edited.ffn[0].value.weight.sum())}

        kept = Checkpoints(tmp_path / folder, 100, {}, "edits")
        setup = Setup(model, editor, SETTINGS, kept, measure=measure)
        torch.manual_seed(1)
        return (run_consecutive if name == "consecutive" else run_breadth_first)(setup, requests)

    straight = run("a", ends_at=0)
    with pytest.raises(KeyboardInterrupt if how == "killed" else PreemptedError):
        # One milestone is measured before.
        run("b", ends_at=2 if name == "consecutive" else 1)
    edits = len(calls)
    torch.manual_seed(5)
    resumed = run("b", ends_at=0)
    assert len(calls) == edits
    assert comparable(resumed.predictions).equals(comparable(straight.predictions))
    assert resumed.norms == straight.norms
    assert resumed.health == straight.health
    assert len(resumed.times) == len(straight.times)
    same_tensors(straight.edit.weights.tensors(), resumed.edit.weights.tensors())


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
