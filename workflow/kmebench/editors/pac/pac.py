"""PAC: parameter-aware contrastive knowledge editing (Zhai et al., ACL 2025).

For a request with target y* and the unedited model's own answer y, the loss

    I = L(f_Θ*(x), y*) + λ L(f_Θ'(x), y)                                    (paper, eq. 7)

is minimised over the segments of the critical transmission paths T+ (first term, Θ*) and of
the insignificant path τ− (second term, Θ'). Each term moves only its own segments. The
two have separate Adam moments and both gradients are taken at the same point, from one
forward pass. In a batch the losses of all requests are summed and minimised over the segments
on the paths of any of them. A request takes no part once its L(y*) is below ``tolerance``; now and
then all are asked again, and those that the others have disturbed go on. Optimisation ends when
every request is learnt, or after ``steps`` updates.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.pac.cache import PathFile, Route
from kmebench.editors.pac.cards import PACHparams
from kmebench.editors.pac.gradients import observed
from kmebench.editors.pac.impact import trace
from kmebench.editors.pac.paths import select_paths
from kmebench.editors.pac.segments import TrainedSegments
from kmebench.editors.pac.zscore import released_scores
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError, EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks

#: Steps of a batch until requests that were learnt are asked again.
RECHECK_EVERY = 5
#: Tokens of a batch up to which a pass costs the reading of the weights more than the arithmetic.
DOUBLED_TOKENS = 48


class _Item(NamedTuple):
    request: EditRequest
    encoded: Encoded
    route: Route


class PAC(Editor):
    """The per-edit schedule of the paper's description."""

    hparams: PACHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        routes = self._routes(model, requests)
        items = [_Item(*parts) for parts in zip(requests, encoded, routes, strict=True)]
        for request, item, route in items:
            if len(route.answer) != item.n_target:
                raise EditError(
                    f"{self.name}: the traced answer of request {request.case_id!r} has "
                    f"{len(route.answer)} tokens and its target {item.n_target}; the paths in "
                    f"{self.assets['paths']} were made with another tokenizer: delete that file "
                    "and the gradients.safetensors that it was made of, and run again."
                )
        with self.stopwatch("optimise"):
            return self._optimise(model, items)

    def _routes(self, model: EditableModel, requests: Sequence[EditRequest]) -> list[Route]:
        """Look the paths up in the cached stage, or trace the model as it is now."""
        if self.hparams.trace_on == "original":
            if self.hparams.score == "abs_zscore":
                raise ConfigError(
                    f"{self.name}: score abs_zscore needs whole gradients, which are not cached; "
                    "set trace_on: current."
                )
            paths = PathFile(self.assets["paths"])
            routes = [paths.route(r.case_id) for r in requests]
            self.stopwatch.add("trace", sum(r.seconds for r in routes))
            return routes
        with self.stopwatch("trace"):
            return trace_routes(model, requests, self.hparams, self.micro_batch)

    def _optimise(self, model: EditableModel, items: Sequence[_Item]) -> WeightDelta:
        choices = [torch.stack([item.route.positive for item in items])]
        if self._contrast:
            choices.append(torch.stack([item.route.negative for item in items]))
        segments = TrainedSegments(model, choices)
        optimiser = torch.optim.Adam(
            segments.parameters(), lr=self.hparams.learning_rate, fused=True
        )
        everyone = asked = list(range(len(items)))
        first = self.steps
        with segments.in_place():
            while self.steps < first + self.hparams.steps:
                optimiser.zero_grad(set_to_none=False)
                learning = self._backward(model, segments, items, asked)
                if learning:
                    optimiser.step()
                    segments.write()
                    self.steps += 1
                elif asked == everyone:
                    break
                recheck = (self.steps - first) % RECHECK_EVERY == 0
                asked = everyone if recheck or not learning else learning
        return segments.delta()

    @property
    def _contrast(self) -> bool:
        return self.hparams.contrast > 0 and self.hparams.negatives > 0

    def _backward(
        self,
        model: EditableModel,
        segments: TrainedSegments,
        items: Sequence[_Item],
        asked: Sequence[int],
    ) -> list[int]:
        """Accumulate the gradient of I over those of ``asked`` not yet learnt; return these."""
        learning = []
        lengths = [len(items[i].encoded.ids) for i in asked]
        for positions in length_sorted_chunks(lengths, self.micro_batch):
            chunk = [asked[i] for i in positions]
            losses = self._chunk_backward(model, segments, items, chunk)
            above = (losses >= self.hparams.tolerance).tolist()
            learning += [i for i, is_above in zip(chunk, above, strict=True) if is_above]
        return sorted(learning)

    def _chunk_backward(
        self,
        model: EditableModel,
        segments: TrainedSegments,
        items: Sequence[_Item],
        chunk: Sequence[int],
    ) -> Tensor:
        """Add the gradient of I over ``chunk``, without what is learnt; return L(y*), [b].

        Both losses need the same forward pass. A long batch, bound by arithmetic, makes it once
        and goes back twice; a short one, bound by reading the weights, goes through the weights
        once each way with its rows doubled.
        """
        batch = model.collate([items[i].encoded for i in chunk])
        own = batch.labels.new_tensor([token for i in chunk for token in items[i].route.answer])
        doubled = self._contrast and batch.input_ids.numel() <= DOUBLED_TOKENS
        kinds: list[int] = []

        def receive(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
            parts = zip(kinds, residual.chunk(len(kinds)), inner.chunk(len(kinds)), strict=True)
            for kind, residual_part, inner_part in parts:
                segments.add_gradient(kind, layer, matrix, residual_part, inner_part)

        with observed(model, receive, range(model.n_layers)):
            logits = model.answer_logits(batch.repeat(2) if doubled else batch)
            edit = row_losses(logits[: len(own)], batch.labels, batch)
            requests = [items[i].request for i in chunk]
            rate = self.hparams.learning_rate
            check_finite(self.name, edit, requests, self.steps, learning_rate=rate)
            above = edit >= self.hparams.tolerance
            if above.any():
                losses = [edit]
                if self._contrast:
                    contrast = row_losses(logits[len(logits) - len(own) :], own, batch)
                    losses.append(self.hparams.contrast * contrast)
                sums = [loss[above].sum() / len(items) for loss in losses]
                for step in [[0, 1]] if doubled else [[kind] for kind in range(len(sums))]:
                    kinds[:] = step
                    last = step[-1] == len(sums) - 1
                    sum(sums[kind] for kind in step).backward(retain_graph=not last)
        return edit.detach()


def trace_routes(
    model: EditableModel,
    requests: Sequence[EditRequest],
    hparams: PACHparams,
    micro_batch: int,
) -> list[Route]:
    """Trace, ``micro_batch`` requests at a time, and select on the model as it is now."""
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    chunks = list(length_sorted_chunks([len(e.ids) for e in encoded], micro_batch))
    impacts = [trace(model, [requests[i] for i in chunk]) for chunk in chunks]
    order = torch.tensor([i for chunk in chunks for i in chunk]).argsort()
    answers = [answer for impact in impacts for answer in impact.answers]
    if hparams.score == "abs_zscore":
        scores = _released_scores(model, encoded, hparams.scope)
    else:
        scores = torch.cat([getattr(impact, hparams.score) for impact in impacts])[order]
        if hparams.scope == "batch":
            scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
    paths = select_paths(scores, hparams.paths, hparams.negatives, hparams.selection)
    positive, negative = paths.positive.cpu(), paths.negative.cpu()
    return [
        Route(positive[i], negative[i], answers[place], 0.0)
        for i, place in enumerate(order.tolist())
    ]


def _released_scores(
    model: EditableModel, encoded: Sequence[Encoded], scope: Literal["edit", "batch"]
) -> Tensor:
    """Score by ``abs_zscore``, [E, L, 2, M]: each request's gradient, or the sum of all."""
    batches = [model.collate([item]) for item in encoded]
    if scope == "batch":
        return released_scores(model, batches).expand(len(batches), -1, -1, -1)
    return torch.stack([released_scores(model, [batch]) for batch in batches])
