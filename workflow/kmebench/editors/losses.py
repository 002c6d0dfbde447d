"""The target loss that gradient editors share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Encoded


def row_losses(logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy per answer token of every row of ``batch``, [R], in nats.

    ``logits`` [A, vocabulary] are the model's at the answer positions, ``labels`` [A] the tokens
    to predict there.
    """
    token_loss = cross_entropy(logits, labels, reduction="none")
    total = token_loss.new_zeros(len(batch.counts)).index_add(0, batch.rows, token_loss)
    return total / batch.counts


def target_losses(model: EditableModel, encoded: Sequence[Encoded]) -> Tensor:
    """Return the loss of each target, [R], in nats per token, with its graph."""
    batch = model.collate(encoded)
    with torch.enable_grad():
        return row_losses(model.answer_logits(batch), batch.labels, batch)


def check_finite(
    editor: str,
    losses: Tensor,
    requests: Sequence[EditRequest],
    step: int,
    **too_large: float,
) -> None:
    """Refuse to go on with a NaN or infinite loss; ``too_large`` is the value to lower, by name.

    Raises:
        EditError: names the editor, the first such request and the step.
    """
    bad = (~losses.isfinite()).nonzero()
    ((name, value),) = too_large.items()
    if len(bad):
        raise EditError(
            f"{editor}: the loss of request {requests[int(bad[0])].case_id!r} became NaN or "
            f"infinite at step {step}; lower {name} (now {value:g})."
        )
