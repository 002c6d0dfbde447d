"""Card of knowledge neurons. Imports no torch."""

from typing import Annotated

from pydantic import Field

from kmebench.editors.cards import Card, Count, Real, Whole, about, hyperparameters
from kmebench.editors.sizes import Job


@hyperparameters
class KNHparams:
    """Hyper-parameters of KN; the paper's and its public implementations'."""

    steps: Annotated[Whole, about("Points m of the integral."), Field(ge=2)] = 20
    threshold: Annotated[Real, about("Share of the largest attribution in a prompt.")] = 0.2
    prompts: Annotated[Count, about("Number n of prompts, the bare edit prompt included.")] = 10
    share: Annotated[
        Real,
        about("A neuron is above the threshold in more of the prompts than this share p."),
        Field(lt=1),
    ] = 0.4
    scale: Annotated[Real, about("Factor of both embeddings.")] = 2.0
    micro_batch: Annotated[
        Count, about("Points of the integrals, of all layers, in one forward pass.")
    ] = 100


def _kn(hparams: KNHparams, job: Job) -> float:
    """The graph of the last token of all points, and what attention keeps of the others."""
    return job.graph(hparams.micro_batch, tokens=2)


CARDS = [
    Card(
        "kn",
        "kmebench.editors.kn.kn:KN",
        KNHparams,
        "kn",
        "Dai et al. 2022, Knowledge neurons in pretrained transformers",
        summary="Finds the FFN neurons that tell the fact and adds embeddings to their values.",
        holds=_kn,
    )
]
