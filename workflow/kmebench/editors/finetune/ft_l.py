"""FT-L: Adam on W2 of one layer, on a loss at the prompt's last token (Meng et al. 2022).

    minimise −(1/n) Σ_j log P(y_j | x) over W2   subject to   ‖W2 − W2_start‖∞ ≤ δ

All n tokens of the target are scored by one distribution, that after the prompt x. The loss is
therefore at least the entropy of those tokens, log n if they differ: then it is never learnt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kmebench.editors.finetune.ft_m import FTM
from kmebench.editors.losses import row_losses
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded


class FTL(FTM):
    """Fine-tuning of one matrix on all tokens of a target as if each came first."""

    def losses(self, model: EditableModel, encoded: Sequence[Encoded]) -> Tensor:
        """Return the mean loss of each target's tokens right after its prompt, [R]."""
        first = [Encoded(item.ids[: len(item.ids) - item.n_target + 1], 1) for item in encoded]
        targets = model.collate(encoded)
        with torch.enable_grad():
            after_prompt = model.answer_logits(model.collate(first))  # [R, vocabulary]
            return row_losses(after_prompt[targets.rows], targets.labels, targets)
