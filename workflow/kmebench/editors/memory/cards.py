"""Cards of editors that remember facts beside the weights. Import no torch."""

from typing import Annotated, Literal

from kmebench.editors.cards import Card, Count, Real, Whole, about, hyperparameters
from kmebench.editors.sizes import Job


@hyperparameters
class GRACEHparams:
    """Hyper-parameters of GRACE; the layer and its radius are for Llama-2-7B."""

    layer: Annotated[Whole, about("Layer whose projection gets the codebook, from 0.")] = 27
    projection: Annotated[Literal["key", "value"], about("W1 or W2 of the layer's FFN.")] = "value"
    radius: Annotated[Real, about("Radius of a new entry, in units of the projection's input.")] = (
        1.0
    )
    replacement: Annotated[
        Literal["last", "prompt", "all"],
        about("Where the output is replaced: the prompt's last token, up to it, everywhere."),
    ] = "last"
    start: Annotated[
        Literal["warm", "cold"],
        about("First value: the projection's own output, or uniform in [0, 1)."),
    ] = "warm"
    learning_rate: Annotated[Real, about("Step size of Adam.")] = 1.0
    steps: Annotated[Whole, about("Updates of a value.")] = 100
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


def _grace(hparams: GRACEHparams, job: Job) -> float:
    """The graph of the layers above the codebook."""
    return job.graph(min(job.requests, hparams.micro_batch), job.layers - hparams.layer)


CARDS = [
    Card(
        "grace",
        "kmebench.editors.memory.grace:GRACE",
        GRACEHparams,
        "memory",
        "Hartvigsen et al. 2023, Aging with GRACE: lifelong model editing with discrete key-value "
        "adaptors",
        summary="Keeps edits in a codebook beside the weights, which answers near their prompts.",
        holds=_grace,
    )
]
