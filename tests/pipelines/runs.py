"""Runs of the pipelines with an editor that counts its calls."""

import pandas as pd
import torch

from kmebench.editors.base import Editor
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
