"""PAC: parameter-aware contrastive knowledge editing (Zhai et al., ACL 2025).

For a request with target y* and the unedited model's own answer y, the loss

    I = L(f_Θ*(x), y*) + λ L(f_Θ'(x), y)                                    (paper, eq. 7)

is minimised over the segments of the critical transmission paths T+ (first term, Θ*) and of
the insignificant path τ− (second term, Θ'). Each term moves only its own segments. The
two have separate Adam moments and both gradients are taken at the same point, from one
forward pass of a doubled batch. Optimisation stops when every L(y*) is below ``tolerance``,
or after ``steps`` updates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.segments import SegmentOffsets
from kmebench.errors import ConfigError, EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.tracing.cache import PathFile, Route
from kmebench.tracing.impact import trace
from kmebench.tracing.paths import select_paths
from kmebench.tracing.released import released_scores
from kmebench.weights.delta import WeightDelta


@dataclass(frozen=True)
class PACHparams:
    """Hyper-parameters of PAC; N, λ and |τ−| are the paper's, the schedule is ours."""

    paths: int = 15  # N = |T+|
    negatives: int = 1  # |τ−|
    lambda_: float = 0.1  # weight of the contrastive loss; 0 leaves it out
    score: Literal["l2", "signed_sum", "abs_zscore"] = "l2"  # the last: trace_on current only
    scope: Literal["edit", "batch"] = "edit"  # paths of each request, or of the whole batch
    selection: Literal["disjoint", "kbest"] = "disjoint"
    trace_on: Literal["original", "current"] = "original"
    learning_rate: float = 2e-4
    steps: int = 50
    tolerance: float = 0.05  # nats per target token
    micro_batch: int = 50  # requests in one forward pass


class PAC(Editor):
    """The per-edit schedule of the paper's description."""

    Hparams = PACHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        routes = self._routes(model, requests)
        for request, item, route in zip(requests, encoded, routes, strict=True):
            if len(route.answer) != item.n_target:
                raise EditError(
                    f"pac: the traced answer of request {request.case_id!r} has "
                    f"{len(route.answer)} tokens and its target {item.n_target}; the paths were "
                    "made with another tokenizer: delete results/trace and run again."
                )
        with self.stopwatch("optimise"):
            return self._optimise(model, requests, encoded, routes)

    def _routes(self, model: EditableModel, requests: Sequence[EditRequest]) -> list[Route]:
        """Look the paths up in the cached stage, or trace the model as it is now."""
        if self.hparams.trace_on == "original":
            if self.hparams.score == "abs_zscore":
                raise ConfigError(
                    "pac: score abs_zscore needs whole gradients, which are not cached; set "
                    "trace_on: current."
                )
            paths = PathFile(self.assets["paths"])
            routes = [paths.route(r.case_id) for r in requests]
            self.stopwatch.add("trace", sum(r.seconds for r in routes))
            return routes
        with self.stopwatch("trace"):
            return trace_routes(model, requests, self.hparams)

    def _optimise(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        routes: Sequence[Route],
    ) -> WeightDelta:
        contrast = self.hparams.lambda_ > 0 and self.hparams.negatives > 0
        groups = [[r.positive for r in routes]] + [[r.negative for r in routes]] * contrast
        offsets = SegmentOffsets(model, groups)
        optimiser = torch.optim.Adam(
            offsets.parameters(), lr=self.hparams.learning_rate, fused=True
        )
        chunks = list(length_sorted_chunks([len(e.ids) for e in encoded], self.hparams.micro_batch))
        for _ in range(self.hparams.steps):
            optimiser.zero_grad()
            worst = 0.0
            for chunk in chunks:
                with torch.enable_grad(), offsets.added(_rows(chunk, len(requests), contrast)):
                    edit_loss, loss = self._losses(model, chunk, encoded, routes, contrast)
                asked = [requests[i] for i in chunk]
                check_finite("pac", edit_loss, asked, self.steps, self.hparams.learning_rate)
                worst = max(worst, float(edit_loss.max()))
                if worst < self.hparams.tolerance and chunk is chunks[-1]:
                    return offsets.delta()
                loss.backward()
            optimiser.step()
            self.steps += 1
        return offsets.delta()

    def _losses(
        self,
        model: EditableModel,
        chunk: Sequence[int],
        encoded: Sequence[Encoded],
        routes: Sequence[Route],
        contrast: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return L(y*) of every request in the chunk, [b], and the chunk's share of I."""
        batch = model.collate([encoded[i] for i in chunk])
        labels, weights = batch.labels, [1.0] * len(chunk)
        if contrast:
            answers = [token for i in chunk for token in routes[i].answer]
            labels = torch.cat([labels, labels.new_tensor(answers)])
            weights += [self.hparams.lambda_] * len(chunk)
            batch = batch.repeat(2)
        row_loss = row_losses(model, batch, labels)
        loss = (row_loss * row_loss.new_tensor(weights)).sum() / len(encoded)
        return row_loss[: len(chunk)].detach(), loss


def _rows(chunk: Sequence[int], n_requests: int, contrast: bool) -> Tensor:
    """Number the rows of a (doubled) batch among all requests' rows."""
    rows = torch.tensor(chunk)
    return torch.cat([rows, rows + n_requests]) if contrast else rows


def trace_routes(
    model: EditableModel, requests: Sequence[EditRequest], hparams: PACHparams
) -> list[Route]:
    """Trace and select on the model as it is now."""
    impacts = [trace(model, [request]) for request in requests]
    if hparams.score == "abs_zscore":
        scores = _released_scores(model, requests, hparams.scope)
    else:
        scores = torch.cat([getattr(impact, hparams.score) for impact in impacts])
        if hparams.scope == "batch":
            scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
    paths = select_paths(scores, hparams.paths, hparams.negatives, hparams.selection)
    return [
        Route(paths.positive[i], paths.negative[i], impact.answers[0], 0.0)
        for i, impact in enumerate(impacts)
    ]


def _released_scores(
    model: EditableModel, requests: Sequence[EditRequest], scope: Literal["edit", "batch"]
) -> Tensor:
    """Score by ``abs_zscore``, [E, L, 2, M]: each request's gradient, or the sum of all."""
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    batches = [model.collate([item]) for item in encoded]
    if scope == "batch":
        return released_scores(model, batches).expand(len(batches), -1, -1, -1)
    return torch.stack([released_scores(model, [batch]) for batch in batches])
