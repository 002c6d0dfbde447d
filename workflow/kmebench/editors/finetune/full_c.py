"""Full-C: constrained fine-tuning (Zhu et al. 2021, "Modifying memories in transformer models").

    minimise L(y*) over the FFN weights W   subject to   ‖W − W0‖∞ ≤ δ

by Adam, projecting onto the constraint after every step. W0 are the weights before any edit,
so along consecutive edits the model stays inside one box around the original.
"""

from collections.abc import Sequence

from torch import Tensor

from kmebench.editors.base import check_layers
from kmebench.editors.finetune.cards import FullCHparams
from kmebench.editors.finetune.training import FineTuning, Trained
from kmebench.models.editable import EditableModel


class FullC(FineTuning):
    """Fine-tuning inside a box around the original weights."""

    hparams: FullCHparams

    def trained(self, model: EditableModel) -> dict[str, Trained]:
        """Return W1 and W2, or W2 alone, of the chosen layers."""
        layers = self.hparams.layers or tuple(range(model.n_layers))
        check_layers(self.name, layers, model)
        ffns = [model.ffn[layer] for layer in layers]
        keys = [ffn.key for ffn in ffns] if self.hparams.projections == "both" else []
        return Trained.by_name(keys + [ffn.value for ffn in ffns])

    def learnt(self, losses: Tensor) -> bool:
        """Whether the worst request is below the tolerance."""
        return float(losses.max()) < self.hparams.tolerance

    def groups(self, n_requests: int) -> Sequence[Sequence[int]]:
        """Return random mini-batches, or all requests as one group."""
        if self.hparams.mini_batch is None:
            return [range(n_requests)]
        return super().groups(n_requests)

    def centers(self, model: EditableModel, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return W0, if it bounds the weights: what no edit has touched starts from it."""
        if self.hparams.norm_constraint is None:
            return {}
        touched = model.edits.touched
        return {n: model.edits.original(n) if n in touched else w for n, w in start.items()}
