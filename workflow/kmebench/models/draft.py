"""Weights changed for a while: what an editor that goes from layer to layer builds on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kmebench.edits.weights import Part, WeightDelta
from kmebench.models.editable import EditableModel


class Draft:
    """A delta under way, carried by the live weights."""

    def __init__(self, model: EditableModel, names: Sequence[str]) -> None:
        self._model = model
        self._masters = {name: model.edits.master(name) for name in names}
        self.delta = WeightDelta({})

    @torch.no_grad()
    def add(self, name: str, part: Part) -> None:
        """Add a part to the delta and to the live weight, at master precision."""
        master = self._masters[name]
        master += part.dense(master.shape).to(master)
        self._model.parameter(name).copy_(master)
        self.delta += WeightDelta({name: part})


@contextmanager
def drafted(model: EditableModel, names: Sequence[str]) -> Iterator[Draft]:
    """Yield a draft of the parameters ``names``; their bits come back at the end."""
    before = {name: model.parameter(name).detach().clone() for name in names}
    try:
        yield Draft(model, names)
    finally:
        for name, values in before.items():
            model.parameter(name).detach().copy_(values)
