"""What the edited layer should say at a subject's last token: v* (ROME) and z* (MEMIT, PMET).

    minimise over δ   mean_contexts L(y*)  +  κ KL(p0 ‖ p_δ)  +  ω ‖δ‖ / ‖h0‖²,   ‖δ‖ ≤ c ‖h0‖

with δ added at t(s) to what the layer says there, h0 what it says in the bare prompt, p_δ the next
token after "{subject} is a" (Meng et al. 2022, eq. 4; Meng et al. 2023, eq. 16). Whether δ is added
to the output of W2 or of the layer is the same; the two differ in h0 alone. PMET (Li et al. 2024)
adds one δ to the attention's output and one to W2's, each with a norm of its own, and writes the
second.

Requests are independent: they share forward passes of their upper layers (see
:mod:`kmebench.models.replay`) and nothing else, and leave the batch when they are learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kmebench.data.records import SLOT, EditRequest
from kmebench.editors.contexts import Contexts, prefixes
from kmebench.editors.keys import module_outputs
from kmebench.editors.target_rows import Site, TargetRows
from kmebench.errors import EditError
from kmebench.logs import track
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import SubjectText, length_sorted_chunks

#: After which the next token is to stay what it was.
KL_PROMPT = f"{SLOT} is a"

#: PMET goes on where the target is learnt but KL is above this, with L(y*) cut to this share.
PMET_KL = 0.01
PMET_SHARE = 0.1


@dataclass(frozen=True)
class TargetSettings:
    """Where δ is added and how it is optimised."""

    layer: int
    site: Site
    steps: int
    learning_rate: float
    kl_factor: float  # κ
    weight_decay: float  # ω
    clamp_factor: float  # c
    stop_loss: float = 0.05
    micro_batch: int = 20  # requests optimised together


@dataclass(frozen=True)
class Targets:
    """What the site should say, in float32 or float64."""

    values: Tensor  # [B, D], h0 + δ; PMET: of W2's output
    start: Tensor  # [B, D], h0
    steps: Tensor  # [B], steps that each request took
    losses: Tensor  # [steps, B], before each step; NaN after a request has stopped


def optimise_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    settings: TargetSettings,
    editor: str,
) -> Targets:
    """Optimise the targets of ``requests`` on the live weights; leaves the model as it was.

    Raises:
        EditError: a loss or a target becomes NaN or infinite; names ``editor``, layer and case_id.
        ModelError: a prompt has no slot, or no token holds the end of its subject.
    """
    texts = [_texts(request, prefixes(contexts), settings) for request in requests]
    n_texts = len(texts[0])
    encoded = model.encode_subjects([text for group in texts for text in group])
    encoded = [encoded[i : i + n_texts] for i in range(0, len(encoded), n_texts)]
    start = torch.stack(
        [module_outputs(model, requests, m, settings.micro_batch) for m in _sites(model, settings)]
    )
    deltas = torch.zeros_like(start)
    losses = start.new_full((settings.steps, len(requests)), torch.nan)
    steps = torch.zeros(len(requests), dtype=torch.long)
    widths = [max(len(e.ids) - e.subject_last for e in group) for group in encoded]
    chunks = list(length_sorted_chunks(widths, settings.micro_batch))
    for chunk in track(chunks, "batches of targets", len(chunks)) if len(chunks) > 1 else chunks:
        rows = TargetRows.of(model, [encoded[i] for i in chunk], settings.layer, settings.site)
        run = _Run(settings, start[:, chunk], [requests[i] for i in chunk], editor)
        losses[:, chunk] = run.optimise(rows)
        deltas[:, chunk], steps[chunk] = run.deltas.detach(), run.steps.cpu()
    return Targets(start[0] + deltas[0], start[0], steps, losses)


def _texts(
    request: EditRequest, before: Sequence[str], settings: TargetSettings
) -> list[SubjectText]:
    """Return the prompts of one request, bare one first, and the KL prompt if it is asked for."""
    texts = [SubjectText(b, request.prompt, request.subject, request.target_new) for b in before]
    kl = [SubjectText("", KL_PROMPT, request.subject, None)]
    return texts + kl if settings.kl_factor > 0 else texts


def _sites(model: EditableModel, settings: TargetSettings) -> list[nn.Module]:
    """Return the U modules whose outputs are measured; the first one's is the target."""
    value = model.ffn[settings.layer].value.module
    return {
        "layer": [model.layers[settings.layer]],
        "value": [value],
        "attention-value": [value, model.attention[settings.layer]],
    }[settings.site]


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

    def optimise(self, rows: TargetRows) -> Tensor:
        """Move the deltas; return the losses before each step, [steps, b]."""
        losses = self.norms.new_full((self.settings.steps, len(self.requests)), torch.nan)
        learning = torch.arange(len(self.requests), device=losses.device)
        for step in range(self.settings.steps):
            with torch.enable_grad():
                loss, kl = self._loss(rows, learning)
            losses[step, learning] = loss.detach()
            self._check_finite(loss.detach(), learning, step)
            goes_on = self._goes_on(loss.detach(), kl.detach(), learning)
            if not goes_on.any():
                break
            self.adam.zero_grad()
            loss.backward(goes_on.to(loss.dtype))
            learning = learning[goes_on]
            self._step(learning)
            self._check_finite(self.deltas.detach()[:, learning].sum(dim=(0, 2)), learning, step)
            if not goes_on.all():
                rows = rows.select(goes_on.nonzero().flatten())
        return losses

    def _loss(self, rows: TargetRows, learning: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each request that is still learning, and its KL."""
        deltas = self.deltas[:, learning]
        nll, kl = (part.to(deltas.device) for part in rows.losses(deltas))
        decay = (deltas.norm(dim=2) / self.norms[:, learning] ** 2).sum(dim=0)
        loss = self.share[learning] * nll + self.settings.kl_factor * kl
        return loss + self.settings.weight_decay * decay, kl

    def _goes_on(self, loss: Tensor, kl: Tensor, learning: Tensor) -> Tensor:
        """Say which requests are not learnt yet."""
        learnt = loss < self.settings.stop_loss
        if self.settings.site != "attention-value":
            return ~learnt
        near = kl <= PMET_KL
        share = torch.where(learnt, PMET_SHARE, self.share[learning])
        self.share[learning] = torch.where(near, 1.0, share)
        return ~(learnt & near)

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

    def _check_finite(self, values: Tensor, learning: Tensor, step: int) -> None:
        bad = learning[~values.isfinite()].tolist()
        if bad:
            raise EditError(
                f"{self.editor}: the target of request {self.requests[bad[0]].case_id!r} at layer "
                f"{self.settings.layer} became NaN or infinite at step {step}; lower "
                f"learning_rate (now {self.settings.learning_rate:g})."
            )
