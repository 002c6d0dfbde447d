"""Cards of PAC (Zhai et al. 2025). Import no torch."""

from typing import Annotated, Literal

from pydantic import Field

from kmebench.editors.cards import Card, Count, Real, Whole, about, hyperparameters
from kmebench.editors.needs import Need, Paths, Pipeline
from kmebench.editors.sizes import Job

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
    selection: Annotated[
        Literal["disjoint", "kbest"], about("Paths that share nothing, or the N best of all.")
    ] = "disjoint"
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


def _paths(hparams: PACHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """Cached paths, where the original model is traced.

    Requests edited one at a time are their own batch, so there scope is always ``edit``.
    """
    if hparams.trace_on != "original":
        return ()
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
]
