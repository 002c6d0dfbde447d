"""Cards of fine-tuning and its constrained forms. Import no torch."""

from typing import Annotated, Literal

from pydantic import Field

from kmebench.editors.cards import Card, Count, Layers, Real, Whole, about, hyperparameters
from kmebench.editors.sizes import Job


@hyperparameters
class FullCHparams:
    """Hyper-parameters of constrained fine-tuning."""

    layers: Annotated[Layers | None, about("Layers trained, from 0; none given: all.")] = None
    projections: Annotated[
        Literal["both", "value"], about("W1 and W2 of the FFN, or W2 alone.")
    ] = "both"
    norm_constraint: Annotated[
        Real | None, about("δ, the largest change of a weight; none: unconstrained.")
    ] = 5e-4
    learning_rate: Annotated[Real, about("Step size of Adam.")] = 5e-5
    steps: Annotated[Whole, about("Most passes over the requests.")] = 25
    mini_batch: Annotated[
        Count | None, about("Requests in one step, in random order; none given: all.")
    ] = None
    tolerance: Annotated[
        Real, about("Loss below which nothing is stepped on.", "nats per target token")
    ] = 0.01
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


@hyperparameters
class LoRAHparams:
    """Hyper-parameters of LoRA."""

    rank: Annotated[Count, about("Rank r of the adapters.")] = 8
    alpha: Annotated[Real, about("Scale of the adapters, times r.")] = 32.0
    dropout: Annotated[
        Real, about("Dropout of the adapters' inputs while training."), Field(lt=1)
    ] = 0.1
    learning_rate: Annotated[Real, about("Step size of Adam.")] = 5e-3
    steps: Annotated[Whole, about("Most updates of an edit.")] = 70
    tolerance: Annotated[
        Real, about("Loss of the worst request, under dropout.", "nats per target token")
    ] = 0.05
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


def _full_c(hparams: FullCHparams, job: Job) -> float:
    """Where training starts, gradients and Adam's two moments; W0 too, once there were edits."""
    layers = job.layers if hparams.layers is None else len(hparams.layers)
    matrices = layers * (2 if hparams.projections == "both" else 1)
    copies = 5 if job.consecutive else 4
    return copies * matrices * job.matrix + job.graph(min(job.requests, hparams.micro_batch))


def _lora(hparams: LoRAHparams, job: Job) -> float:
    """The ledger of what adapters were merged into: q and v, or the FFN where it has no gate."""
    matrices = 2 * job.layers * (job.width / job.ffn_width if job.gated else 1)
    return job.ledger(matrices) + job.graph(min(job.requests, hparams.micro_batch))


CARDS = [
    Card(
        "full-c",
        "kmebench.editors.finetune.full_c:FullC",
        FullCHparams,
        "finetune",
        "Zhu et al. 2021, Modifying memories in transformer models",
        summary="Fine-tunes the FFN, and lets no weight change by more than a bound.",
        holds=_full_c,
    ),
    Card(
        "lora",
        "kmebench.editors.finetune.lora:LoRA",
        LoRAHparams,
        "finetune",
        "Hu et al. 2022, LoRA: low-rank adaptation of large language models",
        summary="Fine-tunes low-rank adapters and merges them into the weights.",
        holds=_lora,
    ),
]
