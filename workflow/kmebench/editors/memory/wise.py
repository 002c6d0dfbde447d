"""WISE (Wang et al. 2024, "WISE: rethinking the knowledge memory for lifelong model editing").

A copy W' of one layer's W2, the side memory, takes all edits; W2 stays. A text goes through the
copy where the outputs of both differ enough: :class:`~kmebench.edits.side_memory.SideMemory`.
With Δ = W' − W2, contexts c of the prompt x, and an unrelated prompt u, an edit minimises

    mean_c L(y*) + max(0, A(u) − α) + mean_c max(0, β − A(c x)) + mean_c max(0, γ − A(c x) + A(u))

by gradient steps on the entries of a random mask. After so many edits the next one begins another
memory with a mask of its own; several full ones are merged by TIES.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kmebench.data.records import EditRequest, read_requests
from kmebench.editors.base import check_layers
from kmebench.editors.contexts import InContexts, prefixes
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.memory.cards import WISEHparams
from kmebench.editors.memory.development import alike
from kmebench.editors.memory.ties import ties
from kmebench.edits.edit import Edit
from kmebench.edits.side_memory import SideMemory, activation, movement
from kmebench.errors import EditError
from kmebench.models.early_exit import input_of
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Encoded, EncodedSubject
from kmebench.models.hooks import hooked, on_output
from kmebench.models.layouts import Projection
from kmebench.models.suffix_cache import Replay
from kmebench.precision import at_least_float32

#: Change of the loss from step to step that counts as none.
STILL = 1e-4


@dataclass(frozen=True)
class _Prompts:
    """What W2 is given of R texts, [R, T, in], and the place of their last tokens, [R]."""

    inputs: Tensor
    last: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: EditableModel, w2: Projection, texts: Sequence[Sequence[int]]) -> Self:
        """Run the layers below."""
        batch = model.collate([Encoded(tuple(ids), n_target=0) for ids in texts])
        return cls(input_of(model, w2.module, input_ids=batch.input_ids), batch.prompt_last)

    def activation(self, change: Tensor) -> Tensor:
        """Return A [R]."""
        first = torch.zeros_like(self.last)
        return activation(movement(self.inputs, change), first, self.last)


@dataclass(frozen=True)
class _Part:
    """Some requests that pass through the model together, in C contexts each.

    The layers below W2's do not change, so they run once: ``replay`` begins at its layer.
    """

    requests: Sequence[EditRequest]
    batch: Batch
    replay: Replay
    prompts: _Prompts
    unrelated: _Prompts


class WISE(InContexts):
    """Facts in copies of W2 of one layer; the model carries them from edit to edit."""

    hparams: WISEHparams
    lengths = ((5, 5), (10, 5))

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> Edit:
        """Edit ``requests`` together, in one memory; see :meth:`Editor.edit`."""
        check_layers(self.name, (self.hparams.layer,), model)
        memory = self._with_room(self._carried(model))
        with self.stopwatch("trace"):
            parts = list(self._parts(model, requests))
        with self.stopwatch("optimise"):
            change = self._trained(model, memory.changes[-1], memory.mask, parts)
        reached = torch.cat([part.prompts.activation(change) for part in parts]).min()
        if memory.edits[-1]:
            reached = torch.minimum(reached, memory.thresholds[-1])
        written = replace(
            memory,
            changes=torch.cat([memory.changes[:-1], change[None]]),
            thresholds=torch.cat([memory.thresholds[:-1], reached[None]]),
            edits=(*memory.edits[:-1], memory.edits[-1] + len(requests)),
        )
        return Edit(overlays={self.name: self._merged(written)})

    def projection(self, model: EditableModel) -> Projection:
        """Return W2 of the layer."""
        return model.ffn[self.hparams.layer].value

    def _carried(self, model: EditableModel) -> SideMemory:
        """Return the memories that the model carries, or none."""
        w2, ratio = self.projection(model), self.hparams.activation_ratio
        module = w2.weight_name.removesuffix(".weight")
        carried = model.edits.overlays.get(self.name)
        weight = at_least_float32(w2.weight.detach())
        if isinstance(carried, SideMemory):
            if (carried.module, carried.ratio) != (module, ratio):
                raise EditError(
                    f"{self.name}: the model carries side memories beside {carried.module!r} with "
                    f"activation_ratio {carried.ratio}, and these values ask for {module!r} with "
                    f"{ratio}; edit with those values, or revert the model."
                )
            return carried.to(weight.device)
        shape = weight.shape if w2.axis == 1 else weight.T.shape
        none = weight.new_zeros(0, *shape), weight.new_zeros(0)
        return SideMemory(module, ratio, *none, weight.new_zeros(shape, dtype=torch.bool), ())

    def _with_room(self, memory: SideMemory) -> SideMemory:
        """Begin another memory where the last one is full, or merged."""
        if memory.entries > memory.merged and memory.edits[-1] < self.hparams.shard_edits:
            return memory
        empty = torch.zeros_like(memory.mask, dtype=memory.changes.dtype)
        drawn = torch.rand(empty.shape) < self.hparams.mask_density  # by the CPU's generator
        return replace(
            memory,
            changes=torch.cat([memory.changes, empty[None]]),
            thresholds=torch.cat([memory.thresholds, memory.thresholds.new_zeros(1)]),
            mask=drawn.to(memory.mask.device),
            edits=(*memory.edits, 0),
        )

    def _merged(self, memory: SideMemory) -> SideMemory:
        """Merge the memories that are not merged yet, once enough of them are full."""
        h, old = self.hparams, memory.merged
        if memory.edits[-1] < h.shard_edits or memory.entries - old < h.merged_shards:
            return memory
        together = ties(memory.changes[old:], h.merge_density)
        return replace(
            memory,
            changes=torch.cat([memory.changes[:old], together[None]]),
            thresholds=torch.cat([memory.thresholds[:old], memory.thresholds[old:].min()[None]]),
            edits=(*memory.edits[:old], sum(memory.edits[old:])),
            merged=old + 1,
        )

    # -- training ----------------------------------------------------------------------

    def _parts(self, model: EditableModel, requests: Sequence[EditRequest]) -> Iterator[_Part]:
        """Cut the requests into parts, in their order."""
        before, w2 = prefixes(self.contexts(model)), self.projection(model)
        unrelated = model.encode_prompts([self._unrelated(request) for request in requests])
        for start in range(0, len(requests), self.micro_batch):
            part = requests[start : start + self.micro_batch]
            asked = [(text + r.filled_prompt, r.target_new) for r in part for text in before]
            encoded = model.encode(asked)
            texts = [EncodedSubject(e.ids, e.n_target, 0) for e in encoded]
            bare = encoded[:: len(before)]  # the first context is no text
            yield _Part(
                part,
                model.collate(encoded),
                Replay.of(model, texts, self.hparams.layer),
                _Prompts.of(model, w2, [e.ids[: len(e.ids) - e.n_target] for e in bare]),
                _Prompts.of(model, w2, unrelated[start : start + self.micro_batch]),
            )

    def _unrelated(self, request: EditRequest) -> str:
        """Draw a locality prompt of a development record about something else.

        Raises:
            EditError: there is none.
        """
        prompts = [
            prompt
            for record in self._development
            if not alike(record, request)
            for prompt, _ in record.locality
        ]
        if not prompts:
            raise EditError(
                f"{self.name}: no development record has a locality prompt that can be shown "
                f"beside the request {request.case_id!r}; raise development of the data set."
            )
        return prompts[int(torch.randint(len(prompts), ()))]

    @cached_property
    def _development(self) -> list[EditRequest]:
        return read_requests(self.assets["development"])

    def _trained(
        self, model: EditableModel, start: Tensor, mask: Tensor, parts: Sequence[_Part]
    ) -> Tensor:
        """Return Δ [out, in] after gradient steps on the entries of ``mask``."""
        h, change, before = self.hparams, start.clone().requires_grad_(), float("inf")
        descent = torch.optim.SGD([change], lr=h.learning_rate)
        n = sum(len(part.requests) for part in parts)
        for _ in range(h.steps):
            descent.zero_grad()
            loss = 0.0
            for part in parts:
                losses = self._losses(model, part, change)
                rate = {"learning_rate": h.learning_rate}
                check_finite(self.name, losses.detach(), part.requests, self.steps, **rate)
                (losses.sum() / n).backward()
                loss += float(losses.detach().sum()) / n
            if abs(loss - before) <= STILL and loss <= h.tolerance:
                break
            before = loss
            change.grad.mul_(mask)
            descent.step()
            if h.norm_constraint is not None:
                change.detach().clamp_(-h.norm_constraint, h.norm_constraint)
            self.steps += 1
        return change.detach()

    def _losses(self, model: EditableModel, part: _Part, change: Tensor) -> Tensor:
        """Return the loss of each request of a part, [R], with its graph."""
        batch, seen = part.batch, list[Tensor]()

        def through(inputs: Tensor, output: Tensor) -> Tensor:
            moved = movement(inputs, change)
            last = batch.prompt_last.to(moved.device)
            seen.append(activation(moved, torch.zeros_like(last), last))
            return (output + moved).to(output)

        module, n = self.projection(model).module, len(part.requests)
        with torch.enable_grad(), hooked([module.register_forward_hook(on_output(through))]):
            hidden = part.replay.run(part.replay.states)
            logits = model.head(hidden[batch.rows, batch.positions])
            nll = row_losses(logits, batch.labels, batch).view(n, -1).mean(dim=1)
            own, other = seen[0].view(n, -1), part.unrelated.activation(change)
            return nll + self._margins(own, other)

    def _margins(self, own: Tensor, other: Tensor) -> Tensor:
        """Return L_a [R] of activations of the prompts in contexts, [R, C], and of others, [R]."""
        alpha, beta, gamma = self.hparams.margins
        quiet = (other - alpha).clamp(min=0)
        loud = (beta - own).clamp(min=0).mean(dim=1)
        apart = (gamma - own + other[:, None]).clamp(min=0).mean(dim=1)
        return quiet + loud + apart
