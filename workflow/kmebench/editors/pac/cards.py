"""Cards of PAC (Zhai et al. 2025). Import no torch."""

from typing import Annotated, Literal

from pydantic import Field

from kmebench.editors.cards import (
    Card,
    Count,
    Layers,
    Positive,
    Real,
    Whole,
    about,
    hyperparameters,
)
from kmebench.editors.needs import (
    Covariance,
    Inverse,
    Need,
    NeutralMetric,
    Paths,
    Pipeline,
    Selection,
)
from kmebench.editors.sizes import Job
from kmebench.errors import ConfigError

_CITATION = (
    "Zhai et al. 2025, Parameter-aware contrastive knowledge editing: tracing and rectifying based "
    "on critical transmission paths"
)
Contrast = Annotated[
    Real, about("Weight of the contrastive loss; 0 leaves it out."), Field(alias="lambda")
]


@hyperparameters
class PACHparams:
    """Hyper-parameters of PAC; N, λ and |τ−| are the paper's, the schedule is ours."""

    paths: Annotated[Count, about("Number of critical paths, N = |T+|.")] = 15
    negatives: Annotated[Whole, about("Number of insignificant paths, |τ−|.")] = 1
    contrast: Contrast = 0.1
    score: Annotated[
        Literal["l2", "signed_sum", "abs_zscore"],
        about("Importance of a segment; abs_zscore, as released, needs trace_on: current."),
    ] = "l2"
    scope: Annotated[
        Literal["edit", "batch"], about("Paths of each request, or of the whole batch.")
    ] = "edit"
    selection: Annotated[Selection, about("Paths that share nothing, or the N best of all.")] = (
        "disjoint"
    )
    trace_on: Annotated[
        Literal["original", "current"], about("The model that is traced: unedited, or as it is.")
    ] = "original"
    learning_rate: Annotated[Real, about("Step size of Adam.")] = 2e-4
    steps: Annotated[Whole, about("Most updates of an edit.")] = 50
    tolerance: Annotated[
        Real, about("Loss below which a request is learnt.", "nats per target token")
    ] = 0.05
    micro_batch: Annotated[Count, about("Requests in one forward pass.")] = 50


@hyperparameters
class PACReleasedHparams:
    """Hyper-parameters of the schedule of the authors' released code, with its values."""

    paths: Annotated[Count, about("Number of critical paths, N = |T+|.")] = 15
    negatives: Annotated[Whole, about("Number of insignificant paths, K = |τ−|.")] = 1
    contrast: Contrast = 0.1
    learning_rate: Annotated[Real, about("Step size of Adam.")] = 1e-5
    epochs: Annotated[Count, about("Passes over all requests.")] = 12
    mini_batch: Annotated[Count, about("Requests in one step.")] = 2
    rescore_every: Annotated[Count, about("Epochs until segments are scored again.")] = 2
    shared_state: Annotated[bool, about("One Adam for both kinds of steps, or one for each.")] = (
        True
    )
    second_step: Annotated[
        Literal["contrast", "momentum"],
        about("The second step's gradients: of the contrastive loss, or all zero."),
    ] = "contrast"
    layers_per_pass: Annotated[Count | None, about("Layers scored at a time; none given: all.")] = (
        None
    )


@hyperparameters
class NPACHparams:
    """Hyper-parameters of natural PAC; layers and damping are those of SmolLM2 135M."""

    layers: Annotated[Layers, about("Layers that may be changed, from 0.")] = (3, 4, 5, 6, 7, 8, 9)
    matrices: Annotated[Literal["value", "both"], about("W2 of these layers alone, or W1 too.")] = (
        "value"
    )
    paths: Annotated[Count | None, about("Segments chosen in each matrix, N; none given: all.")] = (
        None
    )
    share: Annotated[
        Positive,
        about("Share of the sum of all scores that the chosen segments hold together.", le=1),
    ] = 1.0
    positions: Annotated[
        Literal["subject_last", "from_subject", "all"],
        about("Tokens whose gradient counts: the subject's last, from it on, or all."),
    ] = "subject_last"
    step: Annotated[
        Literal["mean", "each", "longest", "adam"],
        about(
            "Down the mean loss of all texts to where it vanishes; to where each text's own does; "
            "as far as nats allow; or by Adam."
        ),
    ] = "mean"
    relaxation: Annotated[
        Positive,
        about("How far a step goes, in times of the way to where the linearised loss vanishes."),
    ] = 1.0
    step_damping: Annotated[Real, about("ε between the texts of step: each.")] = 0.1
    learning_rate: Annotated[Real, about("Step size of step: adam.")] = 1e-3
    nats: Annotated[Positive, about("Most that a step may cost.", "nats per neutral token")] = 2e-4
    contexts: Annotated[Whole, about("Sampled texts before the prompt, beside none.")] = 8
    context_tokens: Annotated[Count, about("Tokens of each sampled text.")] = 10
    memory: Annotated[Real, about("Weight of what earlier edits used in the metric.")] = 0.1
    neighbours: Annotated[
        Whole, about("Prompts about other subjects that are to stay as they are.", le=12)
    ] = 0
    neighbour_weight: Annotated[Real, about("Weight of each of them in the metric, λ.")] = 0.1
    residual_damping: Annotated[Positive, about("ε of the side of the residual stream.")] = 0.1
    segment_damping: Annotated[Positive, about("ε of the side of the segments.")] = 0.003
    segment_side: Annotated[
        Literal["block", "diagonal"], about("Whether segments of W2 are taken together.")
    ] = "block"
    neutral_tokens: Annotated[Count, about("Tokens of self-written text of the metric.")] = 12_288
    steps: Annotated[Whole, about("Most steps of an edit.")] = 30
    tolerance: Annotated[
        Real, about("Mean loss below which a request is learnt.", "nats per target token")
    ] = 0.05
    micro_batch: Annotated[Count, about("Requests in one forward pass, in all contexts.")] = 20

    def __post_init__(self) -> None:
        if self.paths is not None and self.share < 1:
            raise ValueError("paths and share both choose segments; set one of them")

    @property
    def moved(self) -> tuple[int, ...]:
        """The matrices of a layer that are moved: 0 for W1, 1 for W2."""
        return (1,) if self.matrices == "value" else (0, 1)

    @property
    def whole(self) -> bool:
        """Whether W2 is moved as a whole, so that its inverse can be cached."""
        return self.paths is None and self.share == 1 and self.segment_side == "block"


def _paths(hparams: PACHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """Cached paths, where the original model is traced.

    Requests edited one at a time are their own batch, so there scope is always ``edit``.

    Raises:
        ConfigError: paths of a whole turn are asked for, whose requests a seed may shuffle.
    """
    if hparams.trace_on != "original":
        return ()
    if hparams.scope == "batch" and pipeline.turn > 1:
        raise ConfigError(
            "pac: cached paths are those of single requests or of batches, not of turns; set "
            "scope: edit, or trace_on: current."
        )
    whole = hparams.scope == "batch" and pipeline.mode == "batch"
    group = pipeline.batch_size if whole else 1
    h = hparams
    return (Paths(h.score, group, h.selection, h.paths, h.negatives),)


#: Tensors of the size of all chosen segments while a step is written (kmebench/editors/pac/
#: segments.py): what stood in the weights, the masters before, their change, its gradient, Adam's
#: two moments, the change summed over the losses, the masters now, and these as they are written.
_COPIES = 9


def _segments(job: Job, chosen: int) -> float:
    """Bytes of ``chosen`` segments of every matrix, and of those of the edits before in the ledger.

    In the worst case no two edits of a run chose the same.
    """
    earlier = chosen * job.edits / job.requests if job.consecutive else 0
    trained, held = (2 * job.layers * min(n / job.ffn_width, 1) for n in (chosen, earlier))
    return _COPIES * trained * job.matrix + job.ledger(held)


def _pac(hparams: PACHparams, job: Job) -> float:
    """The segments of all requests, and the graph; a single one passes twice, for both losses."""
    chosen = job.requests * (hparams.paths + hparams.negatives)
    return _segments(job, chosen) + job.graph(max(2, min(job.requests, hparams.micro_batch)))


def _metric(hparams: NPACHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """The metric of both sides; that of W2's segments is the covariance, or its inverse."""
    h = hparams
    neutral = NeutralMetric(h.layers, h.neutral_tokens)
    if h.whole:
        return neutral, *(Inverse(layer, h.segment_damping) for layer in h.layers)
    return neutral, Covariance(h.layers)


def _npac(hparams: NPACHparams, job: Job) -> float:
    """Both sides of the metric, twice for a moment; the ledger; the graph of all contexts.

    And what is kept of earlier edits: a row for each of their texts, but never more than two
    matrices hold.
    """
    h = hparams
    texts = min(job.requests, h.micro_batch) * (1 + h.contexts)
    changed = len(h.layers) * len(h.moved)
    sides = len(h.layers) * (2 if job.consecutive else 1) * job.factor
    rows = job.edits * (1 + h.contexts) if job.consecutive and h.memory else 0
    kept = min(rows / job.ffn_width, 2) * len(h.layers) * job.factor
    return sides + kept + 2 * job.ledger(changed) + job.graph(texts)


def _released(hparams: PACReleasedHparams, job: Job) -> float:
    """The segments of all scorings, and the gradients that are summed over several requests."""
    scorings = -(-hparams.epochs // hparams.rescore_every)
    chosen = scorings * (hparams.paths + hparams.negatives)
    scored = min(hparams.layers_per_pass or job.layers, job.layers) if job.requests > 1 else 1
    graph = job.graph(min(job.requests, hparams.mini_batch))
    return _segments(job, chosen) + 2 * scored * job.matrix + graph


CARDS = [
    Card(
        "pac",
        "kmebench.editors.pac.pac:PAC",
        PACHparams,
        "pac",
        _CITATION,
        needs=_paths,
        summary="Trains the FFN's critical paths alone, those of largest impact on the fact.",
        single={"trace_on": "current"},
        holds=_pac,
    ),
    Card(
        "pac-released",
        "kmebench.editors.pac.released:PACReleased",
        PACReleasedHparams,
        "pac",
        _CITATION + " (the schedule of its released code)",
        summary="PAC in passes over all facts, as its released code edits.",
        holds=_released,
    ),
    Card(
        "npac",
        "kmebench.editors.pac.npac:NPAC",
        NPACHparams,
        "pac",
        "This project, after Zhai et al. 2025 and Martens and Grosse 2015 (docs/npac.md)",
        needs=_metric,
        summary="Takes natural steps, measured by what they change of everything else.",
        holds=_npac,
    ),
]
