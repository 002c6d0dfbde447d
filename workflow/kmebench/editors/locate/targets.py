"""What the edited layer should say at a subject's last token: v* (ROME) and z* (MEMIT, PMET).

    minimise over δ   mean_contexts L(y*)  +  κ KL(p_δ ‖ p0)  +  ω ‖δ‖ / ‖h0‖²,   ‖δ‖ ≤ c ‖h0‖

with δ added at t(s) to what the layer says there, h0 what it says in the bare prompt, p_δ the next
token's distribution in "{subject} is a" (Meng et al. 2022, eq. 4; Meng et al. 2023, eq. 16). The
papers' words take it after "is a"; every released code takes it after the subject, and so do
published numbers (``kl_position``). Whether δ is added to the output of W2 or of the layer is the
same; the two differ in h0 alone. PMET (Li et al. 2024) adds one δ to the attention's output and one
to W2's, each with a norm of its own, and writes the second.

Where a norm N stands between W2 and the residual stream (Gemma 2 and 3), the FFN adds N(m) of what
W2 says, m, whose length is bounded. A δ on the layer's output could hardly be reached. There δ is
added to m, h0 is m, and the target is what then stands at the site: z* = h + N(m + δ) − N(m) after
the layer, N(m + δ) for PMET, m + δ for ROME.

NAS scales what is found (:mod:`kmebench.editors.locate.anchor`): whatever the site, v = v0 + δ is
what W2 says.

Requests are independent: they share forward passes of their upper layers (see
:mod:`kmebench.models.suffix_cache`) and nothing else, and leave the batch when they are learnt.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kmebench.data.records import SLOT, EditRequest
from kmebench.editors.contexts import Contexts, prefixes
from kmebench.editors.locate.anchor import Anchor
from kmebench.editors.locate.cards import KLPosition, Site
from kmebench.editors.locate.keys import layer_outputs, module_outputs
from kmebench.editors.locate.target_rows import Losses, TargetRows, moved_modules
from kmebench.errors import EditError
from kmebench.io.logs import track
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import EncodedSubject, SubjectText, length_sorted_chunks

logger = logging.getLogger("kmebench")

#: In which the next token is to stay what it was.
KL_PROMPT = f"{SLOT} is a"

#: Where every context says the target, PMET ends if κ KL is at most this; else L(y*) counts this
#: share in the next step. Constants of the authors' code.
PMET_KL = 0.01
PMET_SHARE = 0.1


@dataclass(frozen=True)
class TargetSettings:
    """Where δ is added and how it is optimised."""

    layer: int
    site: Site
    steps: int  # forward passes; the last one makes no update
    learning_rate: float
    kl_factor: float  # κ
    weight_decay: float  # ω
    clamp_factor: float  # c
    kl_position: KLPosition = "subject_last"
    said_steps: int | None = None  # passes in which every context says the target, then it ends
    stop_loss: float = 0.05  # nats; of the whole loss
    micro_batch: int = 20  # requests optimised together
    anchor: Anchor | None = None  # of NAS
    keep_failed: bool = False  # NaN for a request whose target is not finite, instead of an error


@dataclass(frozen=True)
class Targets:
    """What the site should say, in float32 or float64."""

    values: Tensor  # [B, D], h0 + δ; PMET: what the FFN adds to the residual stream
    start: Tensor  # [B, D], h0
    deltas: Tensor  # [B, D], δ; PMET: that of W2's output
    steps: Tensor  # [B], updates that each request took
    losses: Tensor  # [steps, B], of each forward pass; NaN after a request has stopped
    given_up: Tensor  # [B], bool: NAS refuses the edit, and its δ is 0
    failed: Mapping[str, str]  # case_id -> why its target is NaN, where these are kept


def optimise_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    settings: TargetSettings,
    editor: str,
) -> Targets:
    """Optimise the targets of ``requests`` on the live weights; leaves the model as it was.

    Raises:
        EditError: a loss or a target becomes NaN or infinite, and is not to be kept; names
            ``editor``, layer and case_id.
        ModelError: a prompt has no slot, or no token holds the end of its subject.
    """
    texts = [_texts(request, prefixes(contexts), settings) for request in requests]
    n_texts = len(texts[0])
    flat = [
        _until_subject(e) if e.n_target == 0 and settings.kl_position == "subject_last" else e
        for e in model.encode_subjects([text for group in texts for text in group])
    ]
    encoded = [flat[i : i + n_texts] for i in range(0, len(flat), n_texts)]
    modules = moved_modules(model, settings.layer, settings.site)
    start = torch.stack([module_outputs(model, requests, m, settings.micro_batch) for m in modules])
    deltas = torch.zeros_like(start)
    losses = start.new_full((settings.steps, len(requests)), torch.nan)
    steps = torch.zeros(len(requests), dtype=torch.long)
    failed: dict[str, str] = {}
    widths = [max(len(e.ids) - e.subject_last for e in group) for group in encoded]
    chunks = list(length_sorted_chunks(widths, settings.micro_batch))
    for chunk in track(chunks, "batches of targets", len(chunks)) if len(chunks) > 1 else chunks:
        rows = TargetRows.of(model, [encoded[i] for i in chunk], settings.layer, settings.site)
        run = _Run(settings, start[:, chunk], [requests[i] for i in chunk], editor)
        passes: Iterable[int] = range(settings.steps)
        if len(chunks) == 1 and len(requests) > 1:  # otherwise batches, or edits, show progress
            passes = track(passes, "passes of the targets", settings.steps)
        losses[:, chunk] = run.optimise(rows, passes)
        deltas[:, chunk], steps[chunk] = run.deltas.detach(), run.steps.cpu()
        failed |= {run.requests[place].case_id: why for place, why in run.failed.items()}
    written, given_up = _anchored(model, requests, settings, deltas[0], editor)
    values = _standing(model, requests, settings, start[0], start[0] + written)
    return Targets(values, start[0], written, steps, losses, given_up, failed)


def _texts(
    request: EditRequest, before: Sequence[str], settings: TargetSettings
) -> list[SubjectText]:
    """Return the prompts of one request, bare one first, and the KL prompt if it is asked for."""
    texts = [SubjectText.of(request, b, request.target_new) for b in before]
    kl = [SubjectText("", KL_PROMPT, request.subject, None)]
    return texts + kl if settings.kl_factor > 0 else texts


def _until_subject(encoded: EncodedSubject) -> EncodedSubject:
    """Cut a text after its subject: what follows is neither read nor predicted."""
    return replace(encoded, ids=encoded.ids[: encoded.subject_last + 1])


@torch.no_grad()
def _anchored(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: TargetSettings,
    deltas: Tensor,
    editor: str,
) -> tuple[Tensor, Tensor]:
    """Return what NAS makes of δ [B, D], and which edits it gives up; without it, δ itself."""
    if settings.anchor is None:
        return deltas, torch.zeros(len(requests), dtype=torch.bool, device=deltas.device)
    value = model.ffn[settings.layer].value.module
    said = module_outputs(model, requests, value, settings.micro_batch)
    scaled, given_up = settings.anchor.scaled(deltas, said)
    for place in given_up.nonzero().flatten().tolist():
        logger.info("%s: NAS gives up the edit %r", editor, requests[place].case_id)
    return scaled, given_up


@torch.no_grad()
def _standing(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: TargetSettings,
    before: Tensor,
    after: Tensor,
) -> Tensor:
    """Return what stands at the site, [B, D], once the module with the δ says ``after``."""
    layer, norm = settings.layer, model.ffn[settings.layer].norm
    if norm is None or settings.site == "value":
        return after
    if settings.site == "attention-value":
        return norm(after)
    return layer_outputs(model, requests, layer, settings.micro_batch) + norm(after) - norm(before)


class _Run:
    """The optimisation of b requests that share a batch."""

    def __init__(
        self, settings: TargetSettings, start: Tensor, requests: Sequence[EditRequest], editor: str
    ) -> None:
        self.settings, self.requests, self.editor = settings, requests, editor
        self.norms = start.norm(dim=2)  # [U, b]
        self.deltas = torch.zeros_like(start).requires_grad_()  # [U, b, D]
        self.adam = torch.optim.Adam([self.deltas], lr=settings.learning_rate)
        self.share = torch.ones_like(self.norms[0])  # [b], of L(y*) in the loss
        self.steps = torch.zeros_like(self.norms[0], dtype=torch.long)  # [b]
        self.said = torch.zeros_like(self.steps)  # [b], passes in which all contexts say y*
        self.failed: dict[int, str] = {}  # request among b -> why

    def optimise(self, rows: TargetRows, passes: Iterable[int]) -> Tensor:
        """Move the deltas in all ``passes``; return the losses of each, [steps, b]."""
        losses = self.norms.new_full((self.settings.steps, len(self.requests)), torch.nan)
        learning = torch.arange(len(self.requests), device=losses.device)
        for step in passes:
            with torch.enable_grad():
                loss, parts = self._loss(rows, learning)
            losses[step, learning] = loss.detach()
            finite = self._finite(loss.detach(), learning, step)
            goes_on = self._goes_on(loss.detach(), parts, learning) & finite
            if step == self.settings.steps - 1 or not goes_on.any():
                break
            self.adam.zero_grad()
            loss.backward(goes_on.to(loss.dtype))
            moved = learning[goes_on]
            self._step(moved)
            finite = self._finite(self.deltas.detach()[:, moved].sum(dim=(0, 2)), moved, step)
            goes_on = goes_on.masked_scatter(goes_on, finite)
            learning = learning[goes_on]
            if not len(learning):
                break
            if not goes_on.all():
                rows = rows.select(goes_on.nonzero().flatten())
        with torch.no_grad():
            self.deltas[:, list(self.failed)] = torch.nan
        return losses

    def _loss(self, rows: TargetRows, learning: Tensor) -> tuple[Tensor, Losses]:
        """Return the loss of each request that is still learning, and what it consists of."""
        deltas = self.deltas[:, learning]
        parts = Losses(*(part.to(deltas.device) for part in rows.losses(deltas)))
        decay = (deltas.norm(dim=2) / self.norms[:, learning] ** 2).sum(dim=0)
        loss = self.share[learning] * parts.nll + self.settings.kl_factor * parts.kl
        return loss + self.settings.weight_decay * decay, parts

    def _goes_on(self, loss: Tensor, parts: Losses, learning: Tensor) -> Tensor:
        """Say which requests are not learnt yet."""
        learnt = loss < self.settings.stop_loss
        if self.settings.said_steps is not None:
            self.said[learning] += parts.said
            learnt |= self.said[learning] >= self.settings.said_steps
        if self.settings.site == "attention-value":
            learnt |= parts.said & (self.settings.kl_factor * parts.kl.detach() <= PMET_KL)
            self.share[learning] = torch.where(parts.said, PMET_SHARE, 1.0).to(self.share)
        return ~learnt

    @torch.no_grad()
    def _step(self, learning: Tensor) -> None:
        """Move the deltas of ``learning`` alone, then back into their balls."""
        settled = self.deltas.clone()
        self.adam.step()  # rows of settled requests would drift by momentum
        moved = self.deltas[:, learning]
        bound = self.settings.clamp_factor * self.norms[:, learning]
        scale = (bound / moved.norm(dim=2)).clamp(max=1.0)
        settled[:, learning] = moved * scale[..., None]
        self.deltas.copy_(settled)
        self.steps[learning] += 1

    def _finite(self, values: Tensor, learning: Tensor, step: int) -> Tensor:
        """Say which requests' values are finite; note why others fail, or refuse to go on."""
        finite = values.isfinite()
        for place in learning[~finite].tolist():
            why = (
                f"{self.editor}: the target of request {self.requests[place].case_id!r} at layer "
                f"{self.settings.layer} became NaN or infinite at step {step}; lower "
                f"learning_rate (now {self.settings.learning_rate:g})."
            )
            if not self.settings.keep_failed:
                raise EditError(why)
            logger.warning(why)
            self.failed[place] = why
        return finite
