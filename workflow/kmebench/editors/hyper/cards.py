"""Cards of editors with a trained network. Import no torch."""

from collections.abc import Callable
from typing import Annotated, Any

from kmebench.editors.cards import Card, Count, Positive, Real, Whole, about, hyperparameters, plain
from kmebench.editors.matrices import Matrices, Some, rows_held
from kmebench.editors.needs import Hypernetwork, Need, Pipeline
from kmebench.editors.sizes import Job

ValueLayers = Annotated[Some, about("Layers whose W2 is edited, from 0.")]
KeyLayers = Annotated[Some, about("Layers whose W1 is edited.")]
StepSize = Annotated[Real, about("α of every matrix before training, which learns it.")]
Steps = Annotated[Count, about("Steps of training.")]
Edits = Annotated[Count, about("Edits made together by one change in training.")]
Groups = Annotated[Count, about("Changes, each of an unedited model, for a step.")]
EditWeight = Annotated[Real, about("Weight of the edits' loss in training; that of locality is 1.")]
Rate = Annotated[Real, about("Step size of Adam in training.")]
StepSizeRate = Annotated[Real, about("Step size of Adam for α.")]
Clip = Annotated[Positive, about("Largest norm of a gradient in training.")]


@hyperparameters
class HyperHparams(Matrices):
    """Hyper-parameters of MEND, and what others share with it; the layers are GPT-J's.

    All but ``micro_batch`` decide the training.
    """

    value_layers: ValueLayers = (25, 26, 27)
    key_layers: KeyLayers = (25, 26, 27)
    rank: Annotated[Count, about("Rank ρ of the maps of the network.")] = 1920
    step_size: StepSize = 1e-4
    steps: Steps = 10_000
    edits: Edits = 1
    groups: Groups = 10
    edit_weight: EditWeight = 0.1
    learning_rate: Rate = 1e-6
    step_size_rate: StepSizeRate = 1e-6
    clip: Clip = 100.0
    seed: Annotated[Whole, about("Seed of the first weights and of what training draws.")] = 0


@hyperparameters
class MALMENHparams(HyperHparams):
    """Hyper-parameters of MALMEN; the layers are GPT-J's."""

    value_layers: ValueLayers = (22, 23, 24, 25, 26, 27)
    key_layers: KeyLayers = ()
    step_size: StepSize = 1e-6
    steps: Steps = 300
    edits: Edits = 512
    groups: Groups = 1
    edit_weight: EditWeight = 1.0
    learning_rate: Rate = 1e-5
    step_size_rate: StepSizeRate = 1e-5
    clip: Clip = 1.0


def trained_values(hparams: HyperHparams) -> dict[str, Any]:
    """Return the values that decide the training."""
    return {name: value for name, value in plain(hparams).items() if name != "micro_batch"}


def _needs_of(editor: str) -> Callable[[HyperHparams, Pipeline], tuple[Need, ...]]:
    """Return what says that an editor needs its trained network."""
    return lambda hparams, pipeline: (Hypernetwork(editor, trained_values(hparams)),)


def _holds(hparams: HyperHparams, job: Job) -> float:
    """The network, and what is held of the rows."""
    shapes = bool(hparams.value_layers) + bool(hparams.key_layers or hparams.gate_layers)
    return job.network(hparams.rank, shapes) + rows_held(hparams, job)


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
