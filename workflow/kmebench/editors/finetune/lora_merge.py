"""Continual LoRA with merging (Thede et al. 2025, "WikiBigEdit"; LoRA-Merge in its tables).

    minimise the mean loss of all target tokens over A [r, in], B [out, r] around W_t,
    W_(t+1) = (1 - m) W_t + m (W_t + (alpha / r) B A) = W_t + m (alpha / r) B A

Each group of requests trains an adapter of its own, by Adam in mini-batches, at a rate that falls
as half a cosine from pass to pass. The weighted mean keeps what earlier groups wrote: a new one
may move the weights by the share m of what it would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.finetune.adapters import change
from kmebench.editors.finetune.adapting import AdapterEditor
from kmebench.editors.finetune.cards import LoRAMergeHparams
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded


class LoRAMerge(AdapterEditor):
    """A fresh adapter for each call, folded into the weights by a weighted mean."""

    hparams: LoRAMergeHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        h = self.hparams
        factors = self.trained(model, requests, {})
        return change(model, {}, factors, h.merge_weight * h.alpha / h.rank)

    def _train(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        parameters: Sequence[Tensor],
    ) -> None:
        h = self.hparams
        adam = torch.optim.Adam(parameters, lr=h.learning_rate, fused=True)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=h.steps)
        for _ in range(h.steps):
            for start in range(0, len(requests), h.mini_batch):
                group = slice(start, start + h.mini_batch)
                adam.zero_grad()
                self._backward(model, requests[group], encoded[group])
                adam.step()
                self.steps += 1
            decay.step()

    def _share(self, losses: Tensor, part: Sequence[Encoded], encoded: Sequence[Encoded]) -> Tensor:
        """Weigh each request by its target tokens, so that all of these weigh the same."""
        counts = torch.tensor([item.n_target for item in part], device=losses.device)
        return (losses * counts).sum() / sum(item.n_target for item in encoded)
