"""Cards of editors with a trained network. Import no torch."""

from collections.abc import Callable
from typing import Annotated, Any

from kmebench.editors.cards import Card, Count, Positive, Real, Whole, about, hyperparameters, plain
from kmebench.editors.matrices import Matrices, Some
from kmebench.editors.needs import Hypernetwork, Need, Pipeline
from kmebench.editors.sizes import PROMPT, Job


@hyperparameters
class HyperHparams(Matrices):
    """Hyper-parameters of MEND, and what others share with it; the layers are GPT-J's.

    All but ``micro_batch`` decide the training.
    """

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = (25, 26, 27)
    key_layers: Annotated[Some, about("Layers whose W1 is edited.")] = (25, 26, 27)
    rank: Annotated[Count, about("Rank ρ of the maps of the network.")] = 1920
    step_size: Annotated[Real, about("α of every matrix before training, which learns it.")] = 1e-4
    steps: Annotated[Count, about("Steps of training.")] = 10_000
    edits: Annotated[Count, about("Edits made together by one change in training.")] = 1
    groups: Annotated[Count, about("Changes, each of an unedited model, for a step.")] = 10
    edit_weight: Annotated[
        Real, about("Weight of the edits' loss in training; that of locality is 1.")
    ] = 0.1
    learning_rate: Annotated[Real, about("Step size of Adam in training.")] = 1e-6
    step_size_rate: Annotated[Real, about("Step size of Adam for α.")] = 1e-4
    clip: Annotated[Positive, about("Largest norm of a gradient in training.")] = 100.0
    seed: Annotated[Whole, about("Seed of the first weights and of what training draws.")] = 0
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


@hyperparameters
class MALMENHparams(HyperHparams):
    """Hyper-parameters of MALMEN; the layers are GPT-J's."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = (
        *(22, 23, 24, 25, 26, 27),
    )
    key_layers: Annotated[Some, about("Layers whose W1 is edited.")] = ()
    step_size: Annotated[Real, about("α of every matrix before training, which learns it.")] = 1e-6
    steps: Annotated[Count, about("Steps of training.")] = 300
    edits: Annotated[Count, about("Edits made together by one change in training.")] = 512
    groups: Annotated[Count, about("Changes, each of an unedited model, for a step.")] = 1
    edit_weight: Annotated[
        Real, about("Weight of the edits' loss in training; that of locality is 1.")
    ] = 1.0
    learning_rate: Annotated[Real, about("Step size of Adam in training.")] = 1e-5
    step_size_rate: Annotated[Real, about("Step size of Adam for α.")] = 1e-5
    clip: Annotated[Positive, about("Largest norm of a gradient in training.")] = 1.0


def trained_values(hparams: HyperHparams) -> dict[str, Any]:
    """Return the values that decide the training."""
    return {name: value for name, value in plain(hparams).items() if name != "micro_batch"}


def _needs_of(editor: str) -> Callable[[HyperHparams, Pipeline], tuple[Need, ...]]:
    """Return what says that an editor needs its trained network."""
    return lambda hparams, pipeline: (Hypernetwork(editor, trained_values(hparams)),)


#: Copies of the rows [h; g] of every edited matrix, and of the factors of its change.
_COPIES = 4


def _holds(hparams: HyperHparams, job: Job) -> float:
    """The network, the graph from the lowest layer on, the rows of all tokens, and the ledger."""
    matrices, together = len(hparams.layers), min(job.requests, hparams.micro_batch)
    rows = _COPIES * 8 * job.requests * PROMPT * (job.width + job.ffn_width)
    shapes = bool(hparams.value_layers) + bool(hparams.key_layers or hparams.gate_layers)
    graph = job.graph(together, job.layers - min(hparams.layers))
    return job.network(hparams.rank, shapes) + graph + matrices * rows + job.ledger(matrices)


CARDS = [
    Card(
        "mend",
        "kmebench.editors.hyper.mend:MEND",
        HyperHparams,
        "hyper",
        "Mitchell et al. 2022, Fast model editing at scale",
        _needs_of("mend"),
        "Turns a gradient into an edit by a trained network, token by token.",
        holds=_holds,
    ),
    Card(
        "malmen",
        "kmebench.editors.hyper.malmen:MALMEN",
        MALMENHparams,
        "hyper",
        "Tan et al. 2024, Massive editing for large language models via meta learning",
        _needs_of("malmen"),
        "Turns gradients of many edits into one change by a trained network and ridge regression.",
        holds=_holds,
    ),
]
