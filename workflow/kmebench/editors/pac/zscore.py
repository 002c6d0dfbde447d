"""The importance score of the authors' released code (``abs_zscore``).

It needs whole gradients: of every FFN matrix, oriented [D, M] and summed over all requests,
each of the D rows is standardised over its M entries, and a segment's score is the mean
absolute value of its column. Gradients are made for a few layers at a time, so that memory
can be traded for passes over the data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.editors.pac.gradients import KEY, VALUE, observed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch
from kmebench.precision import at_least_float32


def abs_zscore(gradient: Tensor) -> Tensor:
    """Score segments by a gradient [D, M]: mean over rows of |z-score within the row|, [M].

    The standard deviation is the sample's. A row without any variation scores nothing.
    """
    scale, mean = torch.std_mean(gradient, dim=1, keepdim=True)
    return torch.where(scale > 0, (gradient - mean) / scale, 0.0).abs().mean(dim=0)


def released_scores(
    model: EditableModel, batches: Sequence[Batch], layers_per_pass: int | None = None
) -> Tensor:
    """Score every FFN segment by :func:`abs_zscore`, [L, 2, M], float32 or better.

    The loss of a batch is the mean cross-entropy of all its target tokens; gradients are
    summed over ``batches``. Memory: 2·D·M numbers for each of ``layers_per_pass`` layers
    (none given: all), or for one matrix where there is one batch. Time: one pass over ``batches``
    for each such group of layers.
    """
    size = layers_per_pass or model.n_layers
    groups = [range(model.n_layers)[i : i + size] for i in range(0, model.n_layers, size)]
    return torch.cat([_score_layers(model, batches, layers) for layers in groups])


def _score_layers(model: EditableModel, batches: Sequence[Batch], layers: range) -> Tensor:
    sums, scores = dict[tuple[int, int], Tensor](), dict[tuple[int, int], Tensor]()

    def add(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
        residual, inner = (at_least_float32(x.flatten(0, 1)) for x in (residual, inner))
        if (layer, matrix) in sums:
            sums[layer, matrix].addmm_(residual.T, inner)
        else:
            sums[layer, matrix] = residual.T @ inner
        if batch is batches[-1]:
            scores[layer, matrix] = abs_zscore(sums.pop((layer, matrix))).to(model.device)

    with observed(model, add, layers):
        for batch in batches:
            cross_entropy(model.answer_logits(batch), batch.labels).backward()
    pairs = [torch.stack([scores[layer, KEY], scores[layer, VALUE]]) for layer in layers]
    return torch.stack(pairs)
