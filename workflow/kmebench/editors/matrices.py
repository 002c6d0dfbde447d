"""Which FFN matrices an editor changes, as hyper-parameters. Imports no torch."""

from typing import Annotated

from kmebench.editors.cards import Whole, about, hyperparameters

#: Layers, or none.
Some = tuple[Whole, ...]


@hyperparameters
class Matrices:
    """Layers whose W2, W1 or gate is edited."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = ()
    key_layers: Annotated[Some, about("Layers whose W1 is edited.")] = ()
    gate_layers: Annotated[Some, about("Layers whose gate is edited.")] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("nothing is edited; set value_layers, key_layers or gate_layers")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every matrix that is edited."""
        return (*self.value_layers, *self.key_layers, *self.gate_layers)
