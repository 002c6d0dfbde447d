"""The card of no edit. Imports no torch."""

from kmebench.editors.cards import Card, hyperparameters


@hyperparameters
class NoneHparams:
    """No edit has no hyper-parameters."""


CARDS = [
    Card(
        "none",
        "kmebench.editors.control.none:NoEdit",
        NoneHparams,
        "control",
        "the floor: the unedited model",
        summary="Leaves the model as it is.",
        control=True,
    )
]
