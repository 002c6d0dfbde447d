"""The card of no edit. Imports no torch."""

from typing import Any

from kmebench.editors.cards import Card, hyperparameters
from kmebench.editors.sizes import Job


@hyperparameters
class NoneHparams:
    """No edit has no hyper-parameters."""


def _nothing(hparams: Any, job: Job) -> float:
    return 0.0


CARDS = [
    Card(
        "none",
        "kmebench.editors.control.none:NoEdit",
        NoneHparams,
        "control",
        "the floor: the unedited model",
        summary="Leaves the model as it is.",
        control=True,
        holds=_nothing,
    )
]
