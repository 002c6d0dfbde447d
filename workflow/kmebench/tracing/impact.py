"""Impact scores of FFN segments: the gradient of the target's loss, packed, never dense.

With X [T, D] the input of W1, δ [T, M] the loss gradient at its output, a [T, M] the input of
W2 and g [T, D] the loss gradient at its output, the gradient of key k_j is Xᵀδ_j and that of
value v_j is gᵀa_j (Zhai et al. 2025, eq. 5, with the packing of section 4.2.4). Both the sum
of its entries and its L2 norm follow from these activations exactly:

    Σ_d grad_d = Σ_t (Σ_d X_td) δ_tj        ‖grad‖² = δ_jᵀ (X Xᵀ) δ_j

in O(T·M) memory per layer, with all weights frozen and no buffer the size of a weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.models.editable import EditableModel

KEY, VALUE = 0, 1  # position on the axis of length 2


@dataclass(frozen=True)
class Impact:
    """Scores of every segment for E requests.

    ``l2`` and ``signed_sum`` are float32 [E, L, 2, M] (keys, then values). ``answers`` holds,
    for each request, the traced model's own argmax tokens at the answer positions.
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
    scores = {"l2": torch.zeros(shape), "signed_sum": torch.zeros(shape)}
    with torch.enable_grad(), _scoring(model, scores):
        logits = model.answer_logits(batch)
        token_loss = cross_entropy(logits, batch.labels, reduction="none")
        (token_loss / batch.counts[batch.rows]).sum().backward()
    argmax = logits.detach().argmax(dim=-1).split(batch.counts.tolist())
    return Impact(**scores, answers=[tuple(ids.tolist()) for ids in argmax])


@contextmanager
def _scoring(model: EditableModel, scores: dict[str, Tensor]) -> Iterator[None]:
    """Hook the model so that a backward pass fills ``scores``."""
    handles = []

    def grow_graph(_module, _inputs, output):
        # Weights are frozen: without a leaf that wants gradients there would be no graph.
        return output.detach().requires_grad_()

    def score(layer: int, matrix: int):
        def on_forward(_module, inputs, output):
            x = inputs[0].detach()

            def on_backward(gradient: Tensor) -> None:
                if matrix == KEY:
                    parts = segment_scores(x, gradient)
                else:
                    parts = segment_scores(gradient, x)
                for kind, values in parts.items():
                    scores[kind][:, layer, matrix] = values.cpu()

            output.register_hook(on_backward)

        return on_forward

    handles.append(model.model.get_input_embeddings().register_forward_hook(grow_graph))
    for layer, ffn in enumerate(model.ffn):
        handles.append(ffn.key.module.register_forward_hook(score(layer, KEY)))
        handles.append(ffn.value.module.register_forward_hook(score(layer, VALUE)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def segment_scores(residual: Tensor, coefficient: Tensor) -> dict[str, Tensor]:
    """Return L2 norm and sum of Σ_t residual_t · coefficient_tj for every segment j.

    ``residual`` [E, T, D] lies on the model's residual stream (X for keys, g for values),
    ``coefficient`` [E, T, M] on the FFN's inner side (δ for keys, a for values); results are
    [E, M] in float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(residual.dtype, torch.float32)
    residual, coefficient = residual.to(dtype), coefficient.to(dtype)
    gram = residual @ residual.transpose(1, 2)  # [E, T, T]
    square = ((gram @ coefficient) * coefficient).sum(dim=1)  # [E, M]
    total = (residual.sum(dim=2).unsqueeze(1) @ coefficient).squeeze(1)  # [E, M]
    # Rounding can push a vanishing norm below zero.
    return {"l2": square.clamp(min=0).sqrt(), "signed_sum": total}
