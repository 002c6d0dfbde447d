"""Cards of editors that remember facts beside the weights. Import no torch."""

from typing import Annotated, Literal

from pydantic import Field

from kmebench.editors.cards import Card, Count, Real, Whole, about, hyperparameters
from kmebench.editors.needs import Development, Encoder, Need, Pipeline, Trained
from kmebench.editors.sizes import PROMPT, Job

#: Bytes of the sentence encoder and of its states, and tokens of a block of IKE's context.
_ENCODER, _BLOCK = 0.3e9, 40
#: Questions that are asked together behind a context (evaluation.batch_size).
_QUESTIONS = 32
#: Texts of a request that WISE and MEMOIR train on: the bare prompt and ten contexts.
WISE_TEXTS = 11
#: Texts of MEMOIR's background, and tokens of each: as long as a prompt, since a text's first token
#: is unlike all others and must weigh as much.
BACKGROUND = (100, PROMPT)


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


@hyperparameters
class IKEHparams:
    """Hyper-parameters of IKE; 32 demonstrations take about 1,300 tokens."""

    scope: Annotated[
        Literal["oracle", "retrieved"],
        about("Whose context a question gets: its own request's, or the nearest fact's."),
    ] = "retrieved"
    demonstrations: Annotated[
        Whole, about("Development records shown before the fact; 0 shows the fact alone (ICE).")
    ] = 32
    threshold: Annotated[
        Real, about("Cosine from which on a question is about a fact, if retrieved.", le=1)
    ] = 0.65


@hyperparameters
class SERACHparams:
    """Hyper-parameters of SERAC; its similarity s depends on the classifier."""

    classifier: Annotated[
        Literal["untrained", "trained"],
        about(
            "s = (1 + cosine) / 2 of embeddings as they are, or exp(−‖difference‖²) of embeddings "
            "fine-tuned on the development split."
        ),
    ] = "untrained"
    threshold: Annotated[
        Real | None,
        about("Similarity s from which on a question is in scope; none: 0.8, or trained 0.5."),
        Field(le=1),
    ] = None
    learning_rate: Annotated[Real, about("Step size of Adam in training.")] = 3e-5
    steps: Annotated[Count, about("Most steps of training.")] = 96

    @property
    def least(self) -> float:
        """The threshold."""
        if self.threshold is not None:
            return self.threshold
        return 0.5 if self.classifier == "trained" else 0.8


@hyperparameters
class WISEHparams:
    """Hyper-parameters of WISE; layer and margins are for Llama-2-7B and Mistral-7B."""

    layer: Annotated[Whole, about("Layer whose W2 gets the side memories, from 0.")] = 27
    learning_rate: Annotated[Real, about("Size of a gradient step.")] = 1.0
    steps: Annotated[Whole, about("Most gradient steps of an edit.")] = 70
    tolerance: Annotated[
        Real, about("Loss below which training ends once it stands still.", "nats per target token")
    ] = 0.02
    margins: Annotated[
        tuple[Real, ...],
        Field(min_length=3, max_length=3),
        about(
            "α, β, γ: activations of unrelated prompts stay below α, those of edits above β, "
            "with γ between them.",
            "units of W2's output",
        ),
    ] = (5.0, 20.0, 10.0)
    activation_ratio: Annotated[
        Real, about("Share of the smallest activation of its edits at which a memory opens.")
    ] = 0.88
    norm_constraint: Annotated[
        Real | None, about("Largest change of a weight; none: unconstrained.")
    ] = 1.0
    mask_density: Annotated[
        Real, about("Share of W2's entries that a memory may use, at random."), Field(le=1)
    ] = 0.2
    shard_edits: Annotated[Count, about("Edits after which a memory is full.")] = 500
    merged_shards: Annotated[Count, about("Full memories that are merged into one.")] = 2
    merge_density: Annotated[
        Real, about("Share of a memory's entries, the largest, that a merger keeps."), Field(le=1)
    ] = 0.53
    micro_batch: Annotated[Count, about("Requests in one forward pass, in 11 contexts each.")] = 4


@hyperparameters
class MEMOIRHparams:
    """Hyper-parameters of MEMOIR, as published for Llama-3-8B-Instruct and questions."""

    layer: Annotated[Whole, about("Layer whose W2 gets the memory, from 0.")] = 27
    mask_density: Annotated[
        Real, about("Share of the memory's columns that a fact may use."), Field(le=1)
    ] = 0.2857
    threshold: Annotated[
        Real,
        about("Share of a stored fact's columns that a prompt must select to be about it."),
        Field(le=1),
    ] = 0.4
    learning_rate: Annotated[Real, about("Size of a gradient step.")] = 1.0
    steps: Annotated[Whole, about("Most gradient steps of an edit.")] = 30
    tolerance: Annotated[
        Real, about("Loss below which training ends once it stands still.", "nats per target token")
    ] = 0.02


def _ike_needs(hparams: IKEHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    return (Encoder(), Development()) if hparams.demonstrations else (Encoder(),)


def _serac_needs(hparams: SERACHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    if hparams.classifier == "untrained":
        return (Encoder(),)
    settings = {"learning_rate": hparams.learning_rate, "steps": hparams.steps}
    stage = Trained("kmebench.editors.memory.scope:train", settings, reads_encoder=True)
    return Encoder(), stage


def _wise_needs(hparams: WISEHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    return (Development(),)


def _asked_behind(job: Job, blocks: int) -> float:
    """The encoder, and what attention keeps of a context: in every layer once, in one per question.

    Keys and values of width D both; families whose heads share them keep less.
    """
    layer = 2 * 4 * job.width * blocks * _BLOCK
    return _ENCODER + (job.layers + 2 * _QUESTIONS) * layer


def _ike(hparams: IKEHparams, job: Job) -> float:
    return _asked_behind(job, hparams.demonstrations + 2)


def _serac(hparams: SERACHparams, job: Job) -> float:
    return _asked_behind(job, 1)


def _grace(hparams: GRACEHparams, job: Job) -> float:
    """The graph of the layers above the codebook, and its entries: before, after and on trial."""
    entries = 3 * 4 * job.remembered * (job.width + job.ffn_width)
    return entries + job.graph(min(job.requests, hparams.micro_batch), job.layers - hparams.layer)


def _wise(hparams: WISEHparams, job: Job) -> float:
    """The memories before and after an edit; gradient, mask and step; what W2 is given of texts."""
    full = job.remembered // hparams.shard_edits
    memories = 1 + full // hparams.merged_shards + min(full, hparams.merged_shards)
    inputs = 4 * job.requests * PROMPT * (WISE_TEXTS * job.width + 2 * job.ffn_width)
    texts = WISE_TEXTS * min(job.requests, hparams.micro_batch)
    graph = job.graph(texts, max(job.layers - hparams.layer, 1))
    return (2 * memories + 3) * job.matrix + inputs + graph


def _memoir(hparams: MEMOIRHparams, job: Job) -> float:
    """W_r before and after, its gradient and step; columns of all edits, compared as numbers.

    And the background while it is written, with what W2 is given of it.
    """
    masks = (1 + 4) * job.remembered * job.ffn_width
    rows, length = BACKGROUND
    written = rows * (job.logits + 4 * length * job.ffn_width)
    graph = job.graph(WISE_TEXTS, max(job.layers - hparams.layer, 1))
    return 5 * job.matrix + masks + written + graph


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
    ),
    Card(
        "ike",
        "kmebench.editors.memory.ike:IKE",
        IKEHparams,
        "memory",
        "Zheng et al. 2023, Can we edit factual knowledge by in-context learning?",
        needs=_ike_needs,
        summary="Asks questions about a fact behind demonstrations and the fact itself.",
        holds=_ike,
    ),
    Card(
        "serac",
        "kmebench.editors.memory.serac:SERAC",
        SERACHparams,
        "memory",
        "Mitchell et al. 2022, Memory-based model editing at scale",
        needs=_serac_needs,
        summary="Asks questions in the scope of an edit behind it.",
        holds=_serac,
    ),
    Card(
        "wise",
        "kmebench.editors.memory.wise:WISE",
        WISEHparams,
        "memory",
        "Wang et al. 2024, WISE: rethinking the knowledge memory for lifelong model editing of "
        "large language models",
        needs=_wise_needs,
        summary="Writes edits into a copy of one matrix, and sends texts there that differ in it.",
        holds=_wise,
    ),
    Card(
        "memoir",
        "kmebench.editors.memory.memoir:MEMOIR",
        MEMOIRHparams,
        "memory",
        "Wang et al. 2025, MEMOIR: lifelong model editing with minimal overwrite and informed "
        "retention for LLMs",
        summary="Writes each edit into columns of a matrix beside W2, for prompts like its own.",
        holds=_memoir,
    ),
]
