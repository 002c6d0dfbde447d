"""Cards of editors that make a change of weights out of one gradient. Import no torch."""

from collections.abc import Callable
from typing import Annotated, Literal

from kmebench.editors.cards import Card, Positive, Real, Whole, about, hyperparameters
from kmebench.editors.matrices import Matrices, Some, rows_held
from kmebench.editors.needs import Need, Pipeline, Trained
from kmebench.editors.sizes import Job

Loss = Annotated[
    Literal["sum", "mean"],
    about("Of all answer tokens, or the mean over those of ten requests, as released."),
]


@hyperparameters
class UltraEditHparams(Matrices):
    """Hyper-parameters of UltraEdit; the layers are GPT-J's."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = (
        *(18, 19, 20, 21, 22, 23, 24, 25, 26),
    )
    learning_rate: Annotated[Real, about("η, size of the step of a token.")] = 1e-6
    ridge: Annotated[Positive, about("ρ, the ridge of the solution.")] = 1.0
    loss: Loss = "sum"
    warm_up: Annotated[
        Whole, about("Development requests whose moments come before the first edit's.")
    ] = 0


@hyperparameters
class StableEditHparams(UltraEditHparams):
    """Hyper-parameters of StableEdit; the layers are Mistral's."""

    value_layers: Annotated[Some, about("Layers whose W2 is edited, from 0.")] = (28, 29, 30, 31)
    ridge: Annotated[Positive, about("ρ, the ridge of the solution.")] = 10.0
    loss: Loss = "mean"


#: What decides the moments of the warm-up.
_WARM_UP = ("warm_up", "value_layers", "key_layers", "gate_layers", "loss")


def _needs(editor: str) -> Callable[[UltraEditHparams, Pipeline], tuple[Need, ...]]:
    """Return the needs of an editor: the moments of the warm-up, if there is one."""

    def needs(hparams: UltraEditHparams, pipeline: Pipeline) -> tuple[Need, ...]:
        if not hparams.warm_up:
            return ()
        settings = {name: getattr(hparams, name) for name in _WARM_UP}
        stage = "kmebench.editors.gradient.ultraedit:warm_up"
        return (Trained(stage, {"editor": editor, **settings}),)

    return needs


#: Copies of the scatter while it is updated and its root is taken: it, the old one, their mean,
#: eigenvectors, these scaled, the root, and what the decomposition works in.
_COPIES = 8


def _holds_scatter(hparams: StableEditHparams, job: Job) -> float:
    """UltraEdit's, and the scatter of gradients, its eigenvectors and the factor, by shape."""
    values = bool(hparams.value_layers) * job.width**2
    keys = bool(hparams.key_layers + hparams.gate_layers) * job.ffn_width**2
    return rows_held(hparams, job) + _COPIES * 8 * (values + keys)


CARDS = [
    Card(
        "ultraedit",
        "kmebench.editors.gradient.ultraedit:UltraEdit",
        UltraEditHparams,
        "gradient",
        "Gu et al. 2026, UltraEdit: training-, subject-, and memory-free lifelong editing in "
        "language models",
        _needs("ultraedit"),
        "Writes one normalised gradient step by ridge regression on what the modules read.",
        holds=rows_held,
    ),
    Card(
        "stableedit",
        "kmebench.editors.gradient.stableedit:StableEdit",
        StableEditHparams,
        "gradient",
        "Ma et al. 2026, More edits, more stable: understanding the lifelong normalization in "
        "sequential model editing",
        _needs("stableedit"),
        "UltraEdit with gradients that are whitened by their covariance.",
        holds=_holds_scatter,
    ),
]
