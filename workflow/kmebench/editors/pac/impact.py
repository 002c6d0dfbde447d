"""Impact scores of FFN segments: the gradient of the target's loss, packed, never dense.

With X [T, D] the input of W1, δ [T, M] the loss gradient at its output, a [T, M] the input of
W2 and g [T, D] the loss gradient at its output, the gradient of key k_j is Xᵀδ_j and that of
value v_j is gᵀa_j (Zhai et al. 2025, eq. 5, with the packing of section 4.2.4). Both the sum
of its entries and its L2 norm follow from these activations exactly:

    Σ_d grad_d = Σ_t (Σ_d X_td) δ_tj        ‖grad‖² = δ_jᵀ (X Xᵀ) δ_j

in O(T·M) memory per layer, with all weights frozen and no buffer the size of a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.pac.gradients import observed
from kmebench.models.editable import EditableModel
from kmebench.precision import at_least_float32


@dataclass(frozen=True)
class Impact:
    """Scores of every segment for E requests.

    ``l2`` and ``signed_sum`` are float32 [E, L, 2, M] (keys, then values), on the model's device.
    ``answers`` holds, for each request, the traced model's own argmax tokens at the answer
    positions.
    """

    l2: Tensor
    signed_sum: Tensor
    answers: list[tuple[int, ...]]


def trace(model: EditableModel, requests: Sequence[EditRequest]) -> Impact:
    """Score every FFN segment for every request with one forward and one backward pass.

    The loss of a request is the mean cross-entropy of its target_new tokens; rows of the
    batch do not mix, so each request gets its own gradient.
    """
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    batch = model.collate(encoded)
    shape = (len(requests), model.n_layers, 2, model.ffn_width)
    # On the model's device: a copy to the CPU for every layer would make the GPU wait each time.
    scores = {name: torch.zeros(shape, device=model.device) for name in ("l2", "signed_sum")}

    def score(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
        for kind, values in segment_scores(residual, inner).items():
            scores[kind][:, layer, matrix] = values

    with observed(model, score, range(model.n_layers)):
        logits = model.answer_logits(batch)
        token_loss = cross_entropy(logits, batch.labels, reduction="none")
        (token_loss / batch.counts[batch.rows]).sum().backward()
    argmax = logits.detach().argmax(dim=-1).split(batch.counts.tolist())
    return Impact(**scores, answers=[tuple(ids.tolist()) for ids in argmax])


def segment_scores(residual: Tensor, coefficient: Tensor) -> dict[str, Tensor]:
    """Return L2 norm and sum of Σ_t residual_t · coefficient_tj for every segment j.

    ``residual`` [E, T, D] lies on the model's residual stream (X for keys, g for values),
    ``coefficient`` [E, T, M] on the FFN's inner side (δ for keys, a for values); results are
    [E, M] in float32, or float64 for float64 inputs.
    """
    residual, coefficient = at_least_float32(residual), at_least_float32(coefficient)
    gram = residual @ residual.transpose(1, 2)  # [E, T, T]
    square = ((gram @ coefficient) * coefficient).sum(dim=1)  # [E, M]
    total = (residual.sum(dim=2).unsqueeze(1) @ coefficient).squeeze(1)  # [E, M]
    # Rounding can push a vanishing norm below zero.
    return {"l2": square.clamp(min=0).sqrt(), "signed_sum": total}
