"""Which FFN matrices an editor changes, as hyper-parameters. Imports no torch."""

from typing import Annotated

from kmebench.editors.cards import Count, Whole, about, hyperparameters
from kmebench.editors.sizes import PROMPT, Job

#: Layers, or none.
Some = tuple[Whole, ...]
#: Copies of the rows [h; g] of every edited matrix, and of the factors of its change.
COPIES = 4


@hyperparameters
class Matrices:
    """Layers whose W2, W1 or gate is edited."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = ()
    key_layers: Annotated[Some, about("Layers whose W1 is edited.")] = ()
    gate_layers: Annotated[Some, about("Layers whose gate is edited.")] = ()
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("nothing is edited; set value_layers, key_layers or gate_layers")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every matrix that is edited."""
        return (*self.value_layers, *self.key_layers, *self.gate_layers)


def rows_held(hparams: Matrices, job: Job) -> float:
    """The graph from the lowest layer on, the rows of all tokens, and the ledger, in bytes."""
    matrices, together = len(hparams.layers), min(job.requests, hparams.micro_batch)
    rows = COPIES * 8 * job.requests * PROMPT * (job.width + job.ffn_width)
    graph = job.graph(together, job.layers - min(hparams.layers))
    return graph + matrices * rows + job.ledger(matrices)
