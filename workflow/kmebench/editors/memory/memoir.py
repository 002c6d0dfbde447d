"""MEMOIR (Wang et al. 2025, "MEMOIR: lifelong model editing with minimal overwrite").

A zero matrix W_r beside one layer's W2 takes all edits; W2 stays. Every prompt may use those
columns of W_r that its own largest activations select:
:class:`~kmebench.edits.sparse_memory.SparseMemory`. With m(x) the columns of the bare prompt x,
and contexts c, an edit minimises

    mean_c L(y* | c x),   W2's output being W2 a_t + W_r (m(x) ∘ a_t) at all tokens

by gradient steps of norm one or less. Columns outside m(x) keep their bits, so edits of disjoint
columns do not touch each other.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kmebench.data.records import EditRequest
from kmebench.editors.base import check_layers
from kmebench.editors.contexts import InContexts, prefixes
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.memory.cards import BACKGROUND, MEMOIRHparams
from kmebench.editors.memory.wise import STILL
from kmebench.edits.edit import Edit
from kmebench.edits.sparse_memory import SparseMemory, masked_product, mean_input
from kmebench.errors import EditError
from kmebench.models.early_exit import input_of
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Encoded, EncodedSubject, put_before
from kmebench.models.hooks import hooked, on_output
from kmebench.models.layouts import Projection
from kmebench.models.sampling import sample
from kmebench.models.suffix_cache import Replay
from kmebench.precision import at_least_float32

#: Longest gradient.
NORM = 1.0


class MEMOIR(InContexts):
    """Facts in columns of one matrix; the model carries them from edit to edit."""

    hparams: MEMOIRHparams
    lengths = ((5, 5), (10, 5))

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> Edit:
        """Edit ``requests`` one after another; see :meth:`Editor.edit`."""
        check_layers(self.name, (self.hparams.layer,), model)
        with self.stopwatch("trace"):
            memory = self._carried(model)
        for request in requests:
            memory = self._written(model, memory, request)
        return Edit(overlays={self.name: memory})

    def projection(self, model: EditableModel) -> Projection:
        """Return W2 of the layer."""
        return model.ffn[self.hparams.layer].value

    def _carried(self, model: EditableModel) -> SparseMemory:
        """Return the memory that the model carries, or an empty one."""
        w2, threshold = self.projection(model), self.hparams.threshold
        module, active = w2.weight_name.removesuffix(".weight"), self._active(w2.width)
        carried, device = model.edits.overlays.get(self.name), w2.weight.device
        if isinstance(carried, SparseMemory):
            wanted = (module, threshold, active)
            if (carried.module, carried.threshold, carried.active) != wanted:
                raise EditError(
                    f"{self.name}: the model carries a sparse memory beside {carried.module!r} "
                    f"with {carried.active} columns for each edit and threshold "
                    f"{carried.threshold}, and these values ask for {module!r} with {active} and "
                    f"{threshold}; edit with those values, or revert the model."
                )
            return carried.to(device)
        weight = at_least_float32(w2.weight.detach())
        change = torch.zeros_like(weight if w2.axis == 1 else weight.T)
        masks = change.new_zeros(0, w2.width, dtype=torch.bool)
        order = torch.randperm(w2.width).to(device)  # by the CPU's generator
        return SparseMemory(
            module, threshold, active, change, masks, order, self._background(model)
        )

    def _active(self, width: int) -> int:
        """Return κ of M = ``width``; at least one."""
        return max(1, round(self.hparams.mask_density * width))

    @torch.no_grad()
    def _background(self, model: EditableModel) -> Tensor:
        """Return what W2 is given of text that the model writes, on average, [M]."""
        rows, length = BACKGROUND
        written = sample(model, rows, min(length, model.context or length), seed=0)
        if not put_before(model.tokenizer):  # prompts have no token that begins a text
            written = written[:, 1:]
        module = self.projection(model).module
        states = input_of(model, module, input_ids=written.to(model.device))
        return at_least_float32(states).mean(dim=(0, 1))

    @torch.no_grad()
    def _mask(self, model: EditableModel, memory: SparseMemory, prompt: Sequence[int]) -> Tensor:
        """Return the columns that a prompt may use, bool [M]."""
        batch = model.collate([Encoded(tuple(prompt), n_target=0)])
        inputs = input_of(model, self.projection(model).module, input_ids=batch.input_ids)
        last = batch.prompt_last.to(inputs.device)
        return memory.masks_of(mean_input(inputs, torch.zeros_like(last), last))[0]

    def _written(
        self, model: EditableModel, memory: SparseMemory, request: EditRequest
    ) -> SparseMemory:
        """Write one fact into its columns, and store these if no other fact has them."""
        with self.stopwatch("trace"):
            before = prefixes(self.contexts(model))
            encoded = model.encode(
                [(text + request.filled_prompt, request.target_new) for text in before]
            )
            bare = encoded[0]  # the first context is no text
            mask = self._mask(model, memory, bare.ids[: len(bare.ids) - bare.n_target])
            texts = [EncodedSubject(e.ids, e.n_target, 0) for e in encoded]
            replay = Replay.of(model, texts, self.hparams.layer)
        with self.stopwatch("optimise"):
            batch = model.collate(encoded)
            change = self._trained(model, memory.change, mask, request, batch, replay)
        known = bool((memory.masks == mask).all(dim=1).any())
        masks = memory.masks if known else torch.cat([memory.masks, mask[None]])
        return replace(memory, change=change, masks=masks)

    def _trained(
        self,
        model: EditableModel,
        start: Tensor,
        mask: Tensor,
        request: EditRequest,
        batch: Batch,
        replay: Replay,
    ) -> Tensor:
        """Return W_r [out, in] after gradient steps on the columns of ``mask``.

        ``batch`` and ``replay`` are of the fact in all contexts, from the layer on.
        """
        h, change, before = self.hparams, start.clone().requires_grad_(), float("inf")
        descent = torch.optim.SGD([change], lr=h.learning_rate)
        for _ in range(h.steps):
            descent.zero_grad()
            loss = self._loss(model, change, mask, batch, replay)
            rate = {"learning_rate": h.learning_rate}
            check_finite(self.name, loss.detach()[None], [request], self.steps, **rate)
            now = float(loss.detach())
            if abs(now - before) <= STILL and now <= h.tolerance:
                break
            before = now
            loss.backward()
            clip_grad_norm_([change], NORM)
            descent.step()
            self.steps += 1
        return change.detach()

    def _loss(
        self, model: EditableModel, change: Tensor, mask: Tensor, batch: Batch, replay: Replay
    ) -> Tensor:
        """Return the mean loss over the contexts, with its graph."""

        def through(inputs: Tensor, output: Tensor) -> Tensor:
            return (output + masked_product(inputs, mask[None], change)).to(output)

        module = self.projection(model).module
        with torch.enable_grad(), hooked([module.register_forward_hook(on_output(through))]):
            hidden = replay.run(replay.states)
            logits = model.head(hidden[batch.rows, batch.positions])
            return row_losses(logits, batch.labels, batch).mean()
