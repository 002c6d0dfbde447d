"""Editors that pass over all requests several times, and can go on after any pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kmebench.editors.base import Assets, Editor


class EpochEditor(Editor):
    """An editor whose state after each epoch can be saved.

    While a call's ``after_epoch`` runs, :meth:`state_dict` returns what an editor needs that is to
    go on from there.
    """

    def __init__(self, hparams: Any, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._saved: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state after an epoch; between calls nothing."""
        return self._saved

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the next call go on from ``state``."""
        self._saved = dict(state)

    def resumed(self) -> tuple[int, dict[str, Tensor]]:
        """Return the epochs done before this call and the tensors of :meth:`keep`; (0, {})."""
        state, self._saved = self._saved, {}
        if not state:
            return 0, {}
        self.steps = int(state["steps"])
        for name, seconds in state.items():
            if name.startswith("seconds|"):
                self.stopwatch.add(name.removeprefix("seconds|"), float(seconds))
        return int(state["epochs"]), state

    def keep(self, epochs: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Offer the state after ``epochs`` epochs to be saved."""
        if self.after_epoch is None:
            return
        counts = {"epochs": torch.tensor(epochs), "steps": torch.tensor(self.steps)}
        seconds = {
            f"seconds|{name}": torch.tensor(spent, dtype=torch.float64)
            for name, spent in self.stopwatch.seconds.items()
        }
        self._saved = {**counts, **seconds, **tensors()}
        self.after_epoch(epochs)
        self._saved = {}


def adam_state(adam: torch.optim.Adam, name: str) -> dict[str, Tensor]:
    """Return the moments and counts of an optimiser under names of its own."""
    return {
        f"{name}|{place}|{key}": tensor
        for place, parameter in enumerate(_parameters(adam))
        for key, tensor in adam.state[parameter].items()
    }


def load_adam_state(adam: torch.optim.Adam, name: str, state: Mapping[str, Tensor]) -> None:
    """Put a fresh optimiser of the same parameters into a state of :func:`adam_state`."""
    parameters = _parameters(adam)
    for key, tensor in state.items():
        owner, _, rest = key.partition("|")
        if owner == name:
            place, _, what = rest.partition("|")
            parameter = parameters[int(place)]
            adam.state[parameter][what] = tensor.to(parameter.device, copy=True)


def _parameters(adam: torch.optim.Adam) -> list[Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]
