"""GRACE (Hartvigsen et al. 2023, "Aging with GRACE").

A codebook beside one projection gets an entry per fact: the projection's input at the prompt's
last token as key, and a value trained to answer. Weights never change. Whether a new fact gets
an entry of its own is decided by its distance d to the nearest key, whose radius is r:

    d > r0 + r          a new entry of radius r0
    another answer      a new entry; both radii are cut to d/2, so that the balls do not meet
    the same answer     no entry; the ball grows until it holds the fact

The code of the authors sets both radii of a conflict to d/2, where a ball can grow; here none
does. A fact with the key of an older one, up to rounding, takes its entry over.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, check_layers
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.memory.cards import GRACEHparams
from kmebench.edits.codebook import Codebook
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Passage
from kmebench.errors import EditError
from kmebench.models.early_exit import at_last_tokens
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, EncodedSubject, length_sorted_chunks
from kmebench.models.layouts import Projection
from kmebench.models.suffix_cache import Replay
from kmebench.precision import at_least_float32

#: By which the older of two conflicting balls is smaller than half their distance.
GAP = 1e-5
#: Share of its length by which rounding moves a query, at most, in a batch of another shape.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


class GRACE(Editor):
    """Facts in a codebook; the model carries it from edit to edit."""

    hparams: GRACEHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> Edit:
        """Edit ``requests`` together; see :meth:`Editor.edit`.

        Entries do not interact as long as every fact has one of its own and selects it. Else
        requests are edited one after another.
        """
        check_layers(self.name, (self.hparams.layer,), model)
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        book = self._book(model)
        with self.stopwatch("trace"):
            prompts = [e.ids[: len(e.ids) - e.n_target] for e in encoded]
            module = self.projection(model).module
            queries, outputs = at_last_tokens(model, prompts, module, self.micro_batch)
            starts = outputs if self.hparams.start == "warm" else torch.rand(outputs.shape)
            slack = queries.norm(dim=1) * ROUNDING[model.model.dtype]
        planned, entries = self._inserted(book, encoded, queries, starts, slack)
        with self.stopwatch("optimise"):
            if len(set(entries)) == len(entries) and _selected(planned, queries) == entries:
                book = self._trained(model, planned, entries, encoded, requests)
            else:
                for i in range(len(requests)):
                    one = slice(i, i + 1)
                    parts = (encoded[one], queries[one], starts[one], slack[one])
                    book, entry = self._inserted(book, *parts)
                    book = self._trained(model, book, entry, encoded[one], requests[one])
        return Edit(overlays={self.name: book})

    def projection(self, model: EditableModel) -> Projection:
        """Return the projection that gets the codebook."""
        ffn = model.ffn[self.hparams.layer]
        return ffn.key if self.hparams.projection == "key" else ffn.value

    def _book(self, model: EditableModel) -> Codebook:
        """Return the codebook that the model carries, or an empty one."""
        projection, carried = self.projection(model), model.edits.overlays.get(self.name)
        path = projection.weight_name.removesuffix(".weight")
        wanted = (path, self.hparams.replacement)
        if isinstance(carried, Codebook):
            if (carried.module, carried.replacement) != wanted:
                raise EditError(
                    f"{self.name}: the model carries a codebook beside {carried.module!r} that "
                    f"replaces {carried.replacement!r}, and these values ask for another one "
                    f"({path!r}, {self.hparams.replacement!r}); edit with those values, or revert "
                    "the model."
                )
            return carried.to(projection.weight.device)  # the CPU's Adam has other bits
        weight = at_least_float32(projection.weight.detach())
        key = self.hparams.projection == "key"  # what its weight counts by axis is its output
        n_out, n_in = weight.shape if key == (projection.axis == 0) else reversed(weight.shape)
        empty = (weight.new_zeros(0, n_in), weight.new_zeros(0, n_out), weight.new_zeros(0))
        return Codebook(*wanted, *empty, ())

    def _inserted(
        self,
        book: Codebook,
        encoded: Sequence[Encoded],
        queries: Tensor,
        starts: Tensor,
        slack: Tensor,
    ) -> tuple[Codebook, list[int]]:
        """Give each fact an entry, in order; return the codebook and the entry of each.

        ``slack`` [N] is how far rounding may move each query.
        """
        entries = []
        facts = zip(encoded, queries, starts.to(queries), slack.tolist(), strict=True)
        for item, query, start, moved in facts:
            book, entry = self._with_entry(book, item.target_ids, query, start, moved)
            entries.append(entry)
        return book, entries

    def _with_entry(
        self, book: Codebook, label: tuple[int, ...], query: Tensor, start: Tensor, slack: float
    ) -> tuple[Codebook, int]:
        """Give one fact an entry by the rules at the head of this module."""
        radius = self.hparams.radius
        if not book.entries:
            return _appended(book, label, query, start, radius), 0
        distances, indices = book.nearest(query[None])
        distance, nearest = float(distances), int(indices)
        reach = float(book.radii[nearest])
        if distance > radius + reach:
            return _appended(book, label, query, start, radius), book.entries
        radii = book.radii.clone()
        if label == book.labels[nearest]:
            radii[nearest] = max(reach, distance + slack)
            return replace(book, radii=radii), nearest
        half = distance / 2
        if distance <= max(slack, 2 * GAP):
            labels = (*book.labels[:nearest], label, *book.labels[nearest + 1 :])
            values = book.values.clone()
            values[nearest] = start
            return replace(book, labels=labels, values=values), nearest
        radii[nearest] = min(reach, half - GAP)
        cut = replace(book, radii=radii)
        return _appended(cut, label, query, start, min(radius, half)), book.entries

    def _trained(
        self,
        model: EditableModel,
        book: Codebook,
        entries: Sequence[int],
        encoded: Sequence[Encoded],
        requests: Sequence[EditRequest],
    ) -> Codebook:
        """Train the values of ``entries``, one of each request, on its mean NLL."""
        values, first = book.values.clone(), self.steps
        lengths = [len(item.ids) for item in encoded]
        for chunk in length_sorted_chunks(lengths, self.micro_batch):
            index = torch.tensor([entries[i] for i in chunk], device=values.device)
            asked = [requests[i] for i in chunk]
            self.steps = first
            values[index] = self._optimised(model, book, index, [encoded[i] for i in chunk], asked)
        return replace(book, values=values)

    def _optimised(
        self,
        model: EditableModel,
        book: Codebook,
        index: Tensor,
        encoded: Sequence[Encoded],
        requests: Sequence[EditRequest],
    ) -> Tensor:
        """Return the trained values [b, out] of the entries ``index`` [b].

        The layers below, and what stands before the first replaced token, run once.
        """
        batch = model.collate(encoded)
        first = batch.prompt_last * (book.replacement == "last")  # position replaced, [b]
        begins = zip(encoded, first.tolist(), strict=True)
        texts = [EncodedSubject(item.ids, item.n_target, place) for item, place in begins]
        replay = Replay.of(model, texts, self.hparams.layer)
        columns = batch.positions - first[batch.rows]
        values = book.values[index].clone().requires_grad_()
        adam = torch.optim.Adam([values], lr=self.hparams.learning_rate)
        for _ in range(self.hparams.steps):
            trial = replace(book, values=book.values.index_copy(0, index, values))
            with torch.enable_grad(), model.edits.savepoint():
                model.edits.apply(Edit(overlays={self.name: trial}))
                passage = Passage(batch.prompt_last - first, batch.rows)
                with model.passage(passage):
                    hidden = replay.run(replay.states)
                self._check_reached(passage.decisions[id(trial)], index, requests)
                losses = row_losses(model.head(hidden[batch.rows, columns]), batch.labels, batch)
            rate = self.hparams.learning_rate
            check_finite(self.name, losses.detach(), requests, self.steps, learning_rate=rate)
            (values.grad,) = torch.autograd.grad(losses.sum(), values)
            adam.step()
            self.steps += 1
        return values.detach()

    def _check_reached(
        self, decision: tuple[Tensor, Tensor], index: Tensor, requests: Sequence[EditRequest]
    ) -> None:
        """Refuse facts that do not select their own entries ``index`` [b], which could not learn.

        The same prompt in another batch has another query, by rounding.
        """
        opened, entry = decision
        for reached, request in zip(opened & (entry == index.to(entry)), requests, strict=True):
            if not reached:
                raise EditError(
                    f"{self.name}: rounding puts the request {request.case_id!r} outside the ball "
                    f"of its own entry; raise radius (now {self.hparams.radius}) or choose a "
                    "larger dtype."
                )


def _appended(
    book: Codebook, label: tuple[int, ...], query: Tensor, value: Tensor, radius: float
) -> Codebook:
    return replace(
        book,
        keys=torch.cat([book.keys, query[None].to(book.keys)]),
        values=torch.cat([book.values, value[None].to(book.values)]),
        radii=torch.cat([book.radii, book.radii.new_tensor([radius])]),
        labels=(*book.labels, label),
    )


def _selected(book: Codebook, queries: Tensor) -> list[int]:
    """Return the entries that queries select; -1 where their gate is closed."""
    distances, entries = book.nearest(queries)
    opened = distances <= book.radii.to(distances)[entries]
    return torch.where(opened, entries, -1).tolist()
