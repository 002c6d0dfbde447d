"""Cards of editors that make a change of weights out of one gradient. Import no torch."""

from typing import Annotated, Literal

from kmebench.editors.cards import Card, Count, Positive, Real, Whole, about, hyperparameters
from kmebench.editors.matrices import Matrices, Some
from kmebench.editors.needs import Need, Pipeline, Trained
from kmebench.editors.sizes import PROMPT, Job


@hyperparameters
class UltraEditHparams(Matrices):
    """Hyper-parameters of UltraEdit; the layers are GPT-J's."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = (
        *(18, 19, 20, 21, 22, 23, 24, 25, 26),
    )
    learning_rate: Annotated[Real, about("η, size of the step of a token.")] = 1e-6
    ridge: Annotated[Positive, about("ρ, the ridge of the solution.")] = 1.0
    loss: Annotated[
        Literal["sum", "mean"],
        about("Of all answer tokens, or the mean over those of ten requests, as released."),
    ] = "sum"
    warm_up: Annotated[
        Whole, about("Development requests whose moments come before the first edit's.")
    ] = 0
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


#: What decides the moments of the warm-up.
_WARM_UP = ("warm_up", "value_layers", "key_layers", "gate_layers", "loss")


def _needs(hparams: UltraEditHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """The moments of the warm-up, if there is one."""
    if not hparams.warm_up:
        return ()
    settings = {name: getattr(hparams, name) for name in _WARM_UP}
    return (Trained("kmebench.editors.gradient.ultraedit:warm_up", settings),)


#: Copies of the rows [h; g] of every edited matrix, and of the factors of its change.
_COPIES = 4


def _holds(hparams: UltraEditHparams, job: Job) -> float:
    """The graph from the lowest layer on, the rows of all tokens, and the ledger."""
    matrices, together = len(hparams.layers), min(job.requests, hparams.micro_batch)
    rows = _COPIES * 8 * job.requests * PROMPT * (job.width + job.ffn_width)
    graph = job.graph(together, job.layers - min(hparams.layers))
    return graph + matrices * rows + job.ledger(matrices)


CARDS = [
    Card(
        "ultraedit",
        "kmebench.editors.gradient.ultraedit:UltraEdit",
        UltraEditHparams,
        "gradient",
        "Gu et al. 2026, UltraEdit: training-, subject-, and memory-free lifelong editing in "
        "language models",
        _needs,
        "Writes one normalised gradient step by ridge regression on what the modules read.",
        holds=_holds,
    )
]
