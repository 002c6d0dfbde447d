"""FT-M: Adam on W2 of one layer (EasyEdit, Wang et al. 2024, where it has this name).

    minimise −(1/n) Σ_j log P(y_j | x, y_<j) over W2   subject to   ‖W2 − W2_start‖∞ ≤ δ

over the n tokens y_j of the target; W2_start is the weight when this edit begins.
"""

from collections.abc import Sequence

from torch import Tensor

from kmebench.editors.base import check_layers
from kmebench.editors.finetune.cards import FTHparams
from kmebench.editors.finetune.training import FineTuning, Trained
from kmebench.models.editable import EditableModel


class FTM(FineTuning):
    """Fine-tuning of one matrix on the targets."""

    hparams: FTHparams

    def trained(self, model: EditableModel) -> dict[str, Trained]:
        """Return W2 of the layer."""
        check_layers(self.name, (self.hparams.layer,), model)
        return Trained.by_name([model.ffn[self.hparams.layer].value])

    def groups(self, n_requests: int) -> Sequence[Sequence[int]]:
        """Return mini-batches in the order of the requests."""
        size = self.hparams.mini_batch
        return [range(n_requests)[i : i + size] for i in range(0, n_requests, size)]

    def centers(self, model: EditableModel, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weight at the start of this edit, if it is bounded."""
        return {} if self.hparams.norm_constraint is None else start
