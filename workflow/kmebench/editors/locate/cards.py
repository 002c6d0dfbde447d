"""Cards of the family of ROME. Import no torch."""

from dataclasses import fields
from typing import Annotated, Any, Literal

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
from kmebench.editors.needs import Inverse, Need, Pipeline, Spectrum, Targets, Trained
from kmebench.editors.sizes import SUFFIX, Job, target_graph

#: Where the KL loss looks: at the subject, as released, or after "is a".
KLPosition = Literal["subject_last", "prompt_last"]
#: Whose output a target replaces: the layer's (MEMIT and its family), W2's (ROME), or W2's while
#: the attention's is moved too (PMET).
Site = Literal["layer", "value", "attention-value"]

Steps = Annotated[Whole, about("Forward passes of the target's optimisation, one after the last.")]
Rate = Annotated[Real, about("Step size of Adam.")]
KLFactor = Annotated[Real, about("κ, weight of the KL divergence.")]
Decay = Annotated[Real, about("ω, weight of ‖δ‖ / ‖h‖².")]
Clamp = Annotated[Real, about("c, bound of ‖δ‖ / ‖h‖.")]
Learnt = Annotated[Real, about("Loss below which a target is learnt, and its optimisation ends.")]
Position = Annotated[KLPosition, about("Token after which the KL divergence is taken.")]
Weight = Annotated[Positive, about("λ, weight of the covariance C.")]
Guard = Annotated[
    Positive, about("g of NAS: an edit whose value is longer than g times the mean is given up.")
]
Edited = Annotated[Layers, about("Layers edited, from 0, in this order.")]


@hyperparameters
class TargetHparams:
    """What decides a target besides its site and layer: the loss, and how it is minimised."""

    steps: Steps = 25
    learning_rate: Rate = 0.5
    kl_factor: KLFactor = 0.0625
    weight_decay: Decay = 1e-3
    clamp_factor: Clamp = 4.0
    kl_position: Position = "subject_last"
    stop_loss: Learnt = 0.05
    anchor: Annotated[
        Count | None,
        about("Development records whose values give NAS its length; none: NAS is off."),
    ] = None
    anchor_guard: Guard = 2.0


def loss_of(hparams: TargetHparams) -> dict[str, Any]:
    """Return the values that decide a target, as :class:`Targets` has them."""
    names = {each.name for each in fields(Targets)} - {"site", "layer"}
    return {name: getattr(hparams, name) for name in sorted(names) if hasattr(hparams, name)}


@hyperparameters
class ROMEHparams(TargetHparams):
    """Hyper-parameters of ROME."""

    layer: Annotated[Whole, about("Layer edited, from 0.")] = 5
    second_moment: Annotated[bool, about("Whether the covariance C is used; off: C = I.")] = True
    anchor_guard: Guard = 5.0


@hyperparameters
class MEMITHparams(TargetHparams):
    """Hyper-parameters of MEMIT."""

    layers: Edited = (4, 5, 6, 7, 8)
    moment_weight: Weight = 15_000.0
    micro_batch: Annotated[Count, about("Requests in one forward pass, in all their contexts.")] = (
        20
    )


@hyperparameters
class ENCOREHparams(MEMITHparams):
    """Hyper-parameters of ENCORE; those of Llama-2-7B."""

    weight_decay: Decay = 0.5
    clamp_factor: Clamp = 0.75
    norm_weight: Annotated[Real, about("λ_n, weight of the squared norm of the total change.")] = (
        10.0
    )
    said_steps: Annotated[
        Count | None,
        about("Passes in which every context says the target, until it ends; none: no such end."),
    ] = 3


@hyperparameters
class PMETHparams(MEMITHparams):
    """Hyper-parameters of PMET."""

    steps: Steps = 20
    weight_decay: Decay = 0.5
    clamp_factor: Clamp = 1.0


@hyperparameters
class EMMETHparams(MEMITHparams):
    """Hyper-parameters of EMMET."""

    layers: Edited = (5,)
    moment_weight: Weight = 100_000.0
    epsilon: Annotated[Real, about("ε for two or more requests, as released; 0 is exact.")] = 0.1
    epsilon_single: Annotated[
        bool, about("Whether ε is added for one request too, as in one public toolkit.")
    ] = False


@hyperparameters
class AlphaEditHparams(MEMITHparams):
    """Hyper-parameters of AlphaEdit (which has no λ)."""

    threshold: Annotated[Real, about("Eigenvalues of C below it count as unused.")] = 2e-2
    ridge: Annotated[Real, about("α, the ridge of the solution.")] = 10.0


@hyperparameters
class BetaEditHparams(AlphaEditHparams):
    """Hyper-parameters of BetaEdit."""

    moment_weight: Annotated[Real, about("λ, weight of the covariance C.")] = 3_000.0
    ridge: Annotated[Positive, about("α, the ridge of the solution.")] = 10.0
    refresh_edits: Annotated[
        Count, about("Edits after which the projection is made anew, of their keys as well.")
    ] = 1_000


@hyperparameters
class PRUNEHparams(MEMITHparams):
    """Hyper-parameters of PRUNE."""

    base: Annotated[Real, about("Base of the logarithm that replaces large singular values.")] = 1.2


@hyperparameters
class RECTHparams(MEMITHparams):
    """Hyper-parameters of RECT."""

    share: Annotated[Real, about("Share of the entries of a weight that are kept.")] = 0.4


def anchors(hparams: TargetHparams, layer: int) -> tuple[Need, ...]:
    """Return the lengths that NAS reads, if it is on: by the editor's loss, without early stop."""
    if hparams.anchor is None:
        return ()
    loss = {name: value for name, value in loss_of(hparams).items() if name != "said_steps"}
    settings = {"records": hparams.anchor, "layer": layer, **loss}
    return (Trained("kmebench.editors.locate.anchor_stage:measure", settings),)


def _rome(hparams: ROMEHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    factors = (Inverse(hparams.layer),) if hparams.second_moment else ()
    return *factors, *anchors(hparams, hparams.layer)


def spread(site: Site, factor: type[Inverse | Spectrum] = Inverse) -> Any:
    """Return the needs of an editor of MEMIT's family whose targets stand at ``site``.

    ``factor`` is what it reads of the covariance. Targets are shared in batches alone, which start
    from the original model: on a model with earlier edits they are others. NAS optimises its own.
    """

    def needs(hparams: MEMITHparams, pipeline: Pipeline) -> tuple[Need, ...]:
        factors = tuple(map(factor, hparams.layers))
        last = hparams.layers[-1]
        if pipeline.mode != "batch" or hparams.anchor:
            return *factors, *anchors(hparams, last)
        return *factors, Targets(site, last, **loss_of(hparams))

    return needs


def _encore(hparams: ENCOREHparams, pipeline: Pipeline) -> tuple[Need, ...]:
    """The spectrum of C, of which λC + λ_n I is inverted for any λ; without λ_n the inverse."""
    return tuple(spread("layer", Spectrum if hparams.norm_weight else Inverse)(hparams, pipeline))


#: Texts of which the loss of ROME's target is made: contexts, the bare prompt, that of the KL.
ROME_TEXTS = 22
#: Matrices that RECT's sorting of a change takes, and PRUNE's singular values in float64.
_SORTED, _DECOMPOSED = 10, 10
#: Copies of [M, M] in float64 while BetaEdit makes its projection anew.
_REFRESHED = 6


def _holds_one(hparams: ROMEHparams, job: Job) -> float:
    """C⁻¹, the ledger and the graph of one request's target."""
    factor = job.factor if hparams.second_moment else 0.0
    above = job.layers - hparams.layer
    return factor + job.ledger(1) + job.graph(ROME_TEXTS, above, SUFFIX)


def _holds(hparams: MEMITHparams, job: Job) -> float:
    """A factor of C and the ledger for every layer, and the graph of some requests' targets."""
    layers, together = hparams.layers, min(job.requests, hparams.micro_batch)
    targets = target_graph(job, together, layers[-1])
    return len(layers) * job.factor + job.ledger(len(layers)) + targets


def _holds_keys(hparams: MEMITHparams, job: Job) -> float:
    """MEMIT's, and for every layer the inverse with the keys of all edits, one of them twice."""
    return _holds(hparams, job) + (len(hparams.layers) + 1) * job.factor


def _holds_earlier(hparams: AlphaEditHparams, job: Job) -> float:
    """MEMIT's; for every layer the keys of all edits, projected, too, and their products' factor.

    Those of one layer twice, when an edit's are added.
    """
    edits, layers = job.remembered, len(hparams.layers)
    keys = 4 * edits * job.ffn_width + 8 * edits * job.ffn_width + 8 * edits**2
    return _holds(hparams, job) + (layers + 1) * keys


def _holds_refreshed(hparams: BetaEditHparams, job: Job) -> float:
    """AlphaEdit's; where the projection is made anew, C, what is added, and its spectrum."""
    anew = _REFRESHED * job.factor if job.remembered > hparams.refresh_edits else 0.0
    return _holds_earlier(hparams, job) + anew


def _holds_dense(hparams: RECTHparams, job: Job) -> float:
    return _holds(hparams, job) + (len(hparams.layers) + _SORTED) * job.matrix


def _holds_total(hparams: PRUNEHparams, job: Job) -> float:
    return _holds(hparams, job) + _DECOMPOSED * job.matrix


def _card(
    name: str,
    place: str,
    hparams: type,
    citation: str,
    summary: str,
    needs: Any,
    holds: Any = _holds,
) -> Card:
    implementation = f"kmebench.editors.locate.{place}"
    return Card(name, implementation, hparams, "locate", citation, needs, summary, holds=holds)


CARDS = [
    _card(
        "rome",
        "rome:ROME",
        ROMEHparams,
        "Meng et al. 2022, Locating and editing factual associations in GPT",
        "Writes one key and one value into W2 of one layer, against a covariance.",
        _rome,
        _holds_one,
    ),
    _card(
        "r-rome",
        "r_rome:RROME",
        ROMEHparams,
        "Gupta et al. 2024, Rebuilding ROME",
        "ROME with the same key, averaged over contexts, on both sides of its equation.",
        _rome,
        _holds_one,
    ),
    _card(
        "memit",
        "memit:MEMIT",
        MEMITHparams,
        "Meng et al. 2023, Mass-editing memory in a transformer",
        "Writes many facts at once into W2 of several layers, by least squares.",
        spread("layer"),
    ),
    _card(
        "pmet",
        "pmet:PMET",
        PMETHparams,
        "Li et al. 2024, PMET: precise model editing in a transformer",
        "MEMIT with targets of the FFN alone, found while the attention's output moves too.",
        spread("attention-value"),
    ),
    _card(
        "emmet",
        "emmet:EMMET",
        EMMETHparams,
        "Gupta et al. 2024, A unified framework for model editing",
        "Writes many facts under an equality constraint, as ROME does one.",
        spread("layer"),
    ),
    _card(
        "alphaedit",
        "alphaedit:AlphaEdit",
        AlphaEditHparams,
        "Fang et al. 2025, AlphaEdit: null-space constrained knowledge editing",
        "MEMIT within the null space of what the model knows.",
        spread("layer", Spectrum),
        _holds_earlier,
    ),
    _card(
        "betaedit",
        "betaedit:BetaEdit",
        BetaEditHparams,
        "Liu et al. 2026, BetaEdit: null-space constrained sequential model editing",
        "AlphaEdit with what is preserved weighed in, and a projection that is refreshed.",
        spread("layer", Spectrum),
        _holds_refreshed,
    ),
    _card(
        "memit-seq",
        "memit_seq:MEMITSeq",
        MEMITHparams,
        "Meng et al. 2023; Wang et al. 2026, arXiv 2605.26670 (with the keys of earlier edits)",
        "MEMIT that also keeps what earlier edits of the run have written.",
        spread("layer"),
        _holds_keys,
    ),
    _card(
        "encore",
        "encore:ENCORE",
        ENCOREHparams,
        "Gupta et al. 2025, Lifelong knowledge editing requires better regularization",
        "MEMIT-seq with targets that stop early and a bound on the weights' change.",
        _encore,
        _holds_keys,
    ),
    _card(
        "prune",
        "prune:PRUNE",
        PRUNEHparams,
        "Ma et al. 2025, Perturbation-restrained sequential model editing",
        "MEMIT; at the end, singular values above the weight's largest are restrained.",
        spread("layer"),
        _holds_total,
    ),
    _card(
        "rect",
        "rect:RECT",
        RECTHparams,
        "Gu et al. 2024, Model editing harms general abilities of large language models",
        "MEMIT; of its change only the entries that are largest against the weight are kept.",
        spread("layer"),
        _holds_dense,
    ),
]
