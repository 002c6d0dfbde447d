"""Adam on low-rank adapters: what editors that merge them share."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.finetune.adapters import Factors, adapters
from kmebench.editors.finetune.cards import AdapterHparams
from kmebench.editors.losses import check_finite, target_losses
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks


class AdapterEditor(Editor):
    """Trains adapters of attention, or of the FFN (GPT-J, GPT-2)."""

    hparams: AdapterHparams

    def trained(
        self, model: EditableModel, requests: Sequence[EditRequest], merged: Factors
    ) -> Factors:
        """Return the trained factors; they start from those that the weights hold, if any."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        h = self.hparams
        # Drawn on the CPU, whose generator is in checkpoints: a GPU's, used by dropout, is not.
        seed = int(torch.randint(2**62, ()))
        with self.stopwatch("optimise"), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            with adapters(model, h.rank, h.alpha, h.dropout, merged=merged) as live:
                self._train(model, requests, encoded, [p for pair in live.values() for p in pair])
                return {
                    name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in live.items()
                }

    @abstractmethod
    def _train(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        parameters: Sequence[Tensor],
    ) -> None:
        """Train ``parameters``, the live factors."""

    def _backward(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
    ) -> float:
        """Accumulate the gradient of the mean loss; return the loss of the worst request."""
        worst = 0.0
        lengths = [len(item.ids) for item in encoded]
        for chunk in length_sorted_chunks(lengths, self.micro_batch):
            part = [encoded[i] for i in chunk]
            losses = target_losses(model, part)
            asked = [requests[i] for i in chunk]
            rate = self.hparams.learning_rate
            check_finite(self.name, losses.detach(), asked, self.steps, learning_rate=rate)
            worst = max(worst, float(losses.detach().max()))
            self._share(losses, part, encoded).backward()
        return worst

    def _share(self, losses: Tensor, part: Sequence[Encoded], encoded: Sequence[Encoded]) -> Tensor:
        """Return what ``losses`` [R] of a part add to the mean over all of ``encoded``."""
        return losses.sum() / len(encoded)
