"""Cards of fine-tuning and its constrained forms. Import no torch."""

from typing import Annotated, Literal

from pydantic import Field

from kmebench.editors.cards import Card, Count, Layers, Real, Whole, about, hyperparameters
from kmebench.editors.needs import Need, NeutralMetric, Pipeline, Spectrum
from kmebench.editors.sizes import Job

Rate = Annotated[Real, about("Step size of Adam.")]
Passes = Annotated[Whole, about("Most passes over the requests.")]
MeanTolerance = Annotated[
    Real, about("Mean loss below which nothing is stepped on.", "nats per target token")
]
MicroBatch = Annotated[Count, about("Requests in one forward pass.")]


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
    learning_rate: Rate = 5e-5
    steps: Passes = 25
    mini_batch: Annotated[
        Count | None, about("Requests in one step, in random order; none given: all.")
    ] = None
    tolerance: Annotated[
        Real, about("Loss below which nothing is stepped on.", "nats per target token")
    ] = 0.01
    micro_batch: MicroBatch = 50


@hyperparameters
class FTHparams:
    """Hyper-parameters of FT-L and FT-M, as EasyEdit has them for Llama, GPT-J and Mistral."""

    layer: Annotated[Whole, about("Layer whose W2 is trained, from 0.")] = 21
    norm_constraint: Annotated[
        Real | None, about("δ, the largest change of a weight in an edit; none: unconstrained.")
    ] = None
    learning_rate: Rate = 5e-4
    steps: Passes = 25
    mini_batch: Annotated[Count, about("Requests in one step, in their order.")] = 1
    tolerance: MeanTolerance = 0.01
    micro_batch: MicroBatch = 50


@hyperparameters
class LocFTBFHparams:
    """Hyper-parameters of LocFT-BF; the layer and its matrix are for Llama-3-8B."""

    layer: Annotated[Whole, about("Layer trained, from 0.")] = 22
    parameters: Annotated[
        Literal["value", "key", "layer"],
        about("W2 or W1 of the layer, or all its parameters (attention and norms too)."),
    ] = "value"
    append_eos: Annotated[bool, about("Whether targets end in the end-of-text token.")] = True
    learning_rate: Rate = 5e-4
    steps: Passes = 25
    mini_batch: Annotated[Count, about("Requests in one step, in random order.")] = 100
    tolerance: MeanTolerance = 0.01
    micro_batch: MicroBatch = 50


@hyperparameters
class CrispEditHparams:
    """Hyper-parameters of CrispEdit; the layers are for Llama-3-8B and Mistral-7B."""

    layers: Annotated[Layers, about("Layers whose W2 is trained, from 0.")] = (19, 20, 21, 22, 23)
    gamma: Annotated[
        Real,
        about("γ, share of the curvature whose directions, the steepest, are left alone."),
        Field(le=1),
    ] = 0.8
    project: Annotated[
        Literal["gradient", "update"],
        about("What is projected: gradients before Adam, as published, or Adam's own updates."),
    ] = "gradient"
    neutral_tokens: Annotated[
        Count, about("Tokens of self-written text of which F, one of two factors, is made.")
    ] = 12_288
    learning_rate: Rate = 5e-4
    steps: Passes = 25
    mini_batch: Annotated[Count, about("Requests in one step, in random order.")] = 32
    tolerance: MeanTolerance = 0.01
    micro_batch: MicroBatch = 50


@hyperparameters
class AdapterHparams:
    """Hyper-parameters of low-rank adapters that are trained by Adam."""

    rank: Annotated[Count, about("Rank r of the adapters.")] = 8
    alpha: Annotated[Real, about("Scale of the adapters, times r.")] = 32.0
    dropout: Annotated[
        Real, about("Dropout of the adapters' inputs while training."), Field(lt=1)
    ] = 0.1
    learning_rate: Rate = 5e-3
    steps: Annotated[Whole, about("Most updates of an edit.")] = 70
    micro_batch: MicroBatch = 50


@hyperparameters
class LoRAHparams(AdapterHparams):
    """Hyper-parameters of LoRA."""

    tolerance: Annotated[
        Real, about("Loss of the worst request, under dropout.", "nats per target token")
    ] = 0.05


@hyperparameters
class LoRAMergeHparams(AdapterHparams):
    """Hyper-parameters of LoRA-Merge, as published for models of 7 and 8 billion parameters."""

    rank: Annotated[Count, about("Rank r of the adapters.")] = 4
    alpha: Annotated[Real, about("Scale of the adapters, times r.")] = 8.0
    learning_rate: Annotated[Real, about("Step size of Adam in the first pass.")] = 6.25e-4
    steps: Annotated[Whole, about("Passes over the requests.")] = 9
    mini_batch: Annotated[Count, about("Requests in one step, in their order.")] = 32
    merge_weight: Annotated[
        Real, about("Weight m of the trained weights in the mean with those before."), Field(le=1)
    ] = 0.25


def _crispedit_needs(hparams: CrispEditHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """The factors A and F of every layer, if there is a use for them."""
    if not hparams.gamma:
        return ()
    metric = NeutralMetric(hparams.layers, hparams.neutral_tokens)
    return metric, *map(Spectrum, hparams.layers)


#: Copies of [D, M] in float64 while curvatures are ranked.
_RANKED = 5


def _trained(matrices: float, job: Job) -> float:
    """Where training starts, gradients and Adam's two moments, all in float32.

    Narrower weights have masters besides. Once there were edits, the original weights are kept.
    """
    copies = 4 + (job.weight_bytes < 4) + job.consecutive * job.weight_bytes / 4
    return copies * matrices * job.matrix


def _full_c(hparams: FullCHparams, job: Job) -> float:
    """What is trained, and the graph of all layers."""
    layers = job.layers if hparams.layers is None else len(hparams.layers)
    matrices = layers * (2 if hparams.projections == "both" else 1)
    return _trained(matrices, job) + job.graph(min(job.requests, hparams.micro_batch))


def _ft(hparams: FTHparams, job: Job) -> float:
    """One matrix, and the graph from its layer on."""
    texts = min(job.requests, hparams.mini_batch, hparams.micro_batch)
    return _trained(1, job) + job.graph(texts, max(job.layers - hparams.layer, 1))


def _locft_bf(hparams: LocFTBFHparams, job: Job) -> float:
    """One matrix, or those of a layer with its attention, and the graph from there on."""
    ffn, attention = 2 + job.gated, 4 * job.width / job.ffn_width
    matrices = ffn + attention if hparams.parameters == "layer" else 1
    texts = min(job.requests, hparams.mini_batch, hparams.micro_batch)
    return _trained(matrices, job) + job.graph(texts, max(job.layers - hparams.layer, 1))


def _crispedit(hparams: CrispEditHparams, job: Job) -> float:
    """The matrices, the eigenvectors of every layer, and what curvatures are ranked with."""
    layers = len(hparams.layers)
    spaces = layers * (job.factor / 2 + job.matrix / 4) + job.factor + 2 * _RANKED * job.matrix
    texts = min(job.requests, hparams.mini_batch, hparams.micro_batch)
    graph = job.graph(texts, max(job.layers - min(hparams.layers), 1))
    return _trained(layers, job) + layers * job.matrix + bool(hparams.gamma) * spaces + graph


def _adapted(job: Job, texts: int) -> float:
    """The ledger of what adapters were merged into: q and v, or the FFN where it has no gate."""
    matrices = 2 * job.layers * (job.width / job.ffn_width if job.gated else 1)
    return job.ledger(matrices) + job.graph(texts)


def _lora(hparams: LoRAHparams, job: Job) -> float:
    return _adapted(job, min(job.requests, hparams.micro_batch))


def _lora_merge(hparams: LoRAMergeHparams, job: Job) -> float:
    return _adapted(job, min(job.requests, hparams.mini_batch, hparams.micro_batch))


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
    Card(
        "lora-merge",
        "kmebench.editors.finetune.lora_merge:LoRAMerge",
        LoRAMergeHparams,
        "finetune",
        "Thede et al. 2025, WikiBigEdit: understanding the limits of lifelong knowledge editing in "
        "LLMs",
        summary="Trains a fresh adapter on each group and folds it in by a weighted mean.",
        holds=_lora_merge,
    ),
    Card(
        "ft-l",
        "kmebench.editors.finetune.ft_l:FTL",
        FTHparams,
        "finetune",
        "Meng et al. 2022, Locating and editing factual associations in GPT (its baseline FT)",
        summary="Fine-tunes W2 of one layer on the target's tokens, all right after the prompt.",
        holds=_ft,
    ),
    Card(
        "ft-m",
        "kmebench.editors.finetune.ft_m:FTM",
        FTHparams,
        "finetune",
        "Zhang et al. 2024, A comprehensive study of knowledge editing for large language models",
        summary="Fine-tunes W2 of one layer on the target.",
        holds=_ft,
    ),
    Card(
        "locft-bf",
        "kmebench.editors.finetune.locft_bf:LocFTBF",
        LocFTBFHparams,
        "finetune",
        "Yang et al. 2026, Fine-tuning done right in model editing",
        summary="Fine-tunes one matrix in passes of mini-batches over all facts.",
        holds=_locft_bf,
    ),
    Card(
        "crispedit",
        "kmebench.editors.finetune.crispedit:CrispEdit",
        CrispEditHparams,
        "finetune",
        "Ikram et al. 2026, CrispEdit: low-curvature projections for scalable non-destructive LLM "
        "editing",
        needs=_crispedit_needs,
        summary="Fine-tunes matrices in directions that hardly change what is said of other text.",
        holds=_crispedit,
    ),
]
