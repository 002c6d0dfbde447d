"""Runs of the pipelines with an editor that counts its calls; runs that are killed and resumed."""

import pandas as pd
import pytest
import torch

from kmebench.editors.base import Editor
from kmebench.edits.edit import overlay_tensors
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches, run_consecutive

SETTINGS = Settings(batch_size=8, wild_max_tokens=4)


class Counting(Editor):
    """Moves one weight by as much as it has been called: an editor with memory."""

    def __init__(self, fail_at=None):
        super().__init__(None, {})
        self.calls, self.fail_at = torch.zeros(1), fail_at

    def edit(self, model, requests):
        if self.fail_at == int(self.calls):
            raise KeyboardInterrupt
        self.calls = self.calls + 1
        with self.stopwatch("solve"):
            name = model.ffn[0].value.weight_name
            noise = torch.rand(model.parameter(name).shape)
            return WeightDelta({name: Dense(self.calls * noise * 0.1)})

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state.get("calls", torch.zeros(1))


def checkpoints(folder, every=1, identity="one"):
    return Checkpoints(folder, every, {"run": identity})


def consecutive(model, editor, requests, folder, **kwargs):
    torch.manual_seed(0)
    return run_consecutive(Setup(model, editor, SETTINGS, checkpoints(folder, **kwargs)), requests)


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.map(lambda cell: tuple(cell) if hasattr(cell, "__len__") else cell)


def in_batches(model, editor, requests, size, folder, **kwargs):
    torch.manual_seed(0)
    setup = Setup(model, editor, SETTINGS, checkpoints(folder), **kwargs)
    return run_batches(setup, requests, size)


def killed_and_resumed(make, requests, folder, turn=1):
    """Run ``requests`` to the end, and again with a kill at the last one: the same bytes.

    ``make`` returns a fresh model and a fresh editor. Returns the outcome, and the editor's state.
    """

    def run(name, killed=False):
        model, editor = make()
        whole = editor.edit

        def edit(model, group):
            if killed and group[-1] is requests[-1]:
                raise KeyboardInterrupt
            return whole(model, group)

        editor.edit = edit
        torch.manual_seed(0)
        setup = Setup(model, editor, SETTINGS, checkpoints(folder / name))
        return run_consecutive(setup, requests, turn), editor.state_dict()

    straight, state = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed=True)
    assert [path for path in (folder / "killed").iterdir() if path.name.isdecimal()]
    resumed, again = run("killed")
    assert comparable(resumed.predictions).equals(comparable(straight.predictions))
    assert resumed.norms == straight.norms
    same_tensors(straight.edit.weights.tensors(), resumed.edit.weights.tensors())
    same_tensors(overlay_tensors(straight.edit.overlays), overlay_tensors(resumed.edit.overlays))
    same_tensors(state, again)
    return straight, state


def same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
