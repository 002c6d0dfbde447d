"""The neutral metric as a cached stage: moments of FFN matrices over text that a model writes.

A plainly sampled token is a label drawn from the model's own distribution. So E[g gᵀ] over the
loss of such text is the Fisher matrix of what the model says (Martens 2020, section 5), and its
second derivative the KL divergence. The moment of W2's inputs is the covariance stage's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.editors.needs import NeutralMetric
from kmebench.editors.pac.gradients import KEY, observed
from kmebench.editors.sizes import METRIC_LAYERS, METRIC_LENGTH, METRIC_ROWS
from kmebench.errors import EditError
from kmebench.io.logs import track
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.models.editable import EditableModel
from kmebench.models.sampling import sample
from kmebench.precision import at_least_float32


class Moments(NamedTuple):
    """What a layer's metric is made of, float32, per token of neutral text."""

    inputs: Tensor  # E[x xᵀ] of W1's input, [D, D]
    inner: Tensor  # E[g²] of the loss gradient at W1's output, [M]
    outputs: Tensor  # E[g gᵀ] of the loss gradient at W2's output, [D, D]


def write_metric(path: str | Path, model: EditableModel, need: NeutralMetric) -> None:
    """Measure the moments of the layers of ``need`` over as many tokens, and write them.

    Raises:
        EditError: the model does not have such layers.
    """
    layers = sorted(set(need.layers))
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise EditError(
            f"The neutral metric is asked for layers {layers}, not all of which are among the "
            f"model's 0 to {model.n_layers - 1}."
        )
    length = min(METRIC_LENGTH, model.context or METRIC_LENGTH)
    text = sample(model, -(-need.tokens // (length - 1)), length, need.seed)
    moments: dict[int, Moments] = {}
    for start in range(0, len(layers), METRIC_LAYERS):
        moments |= measure(model, text, layers[start : start + METRIC_LAYERS])
    save_metric(path, moments, text[:, 1:].numel())


def save_metric(path: str | Path, moments: Mapping[int, Moments], tokens: int) -> None:
    """Write the moments of some layers, with the number of tokens that they are means over."""
    tensors = {
        f"{layer}.{name}": tensor
        for layer, own in moments.items()
        for name, tensor in own._asdict().items()
    }
    write_tensors(path, tensors, NeutralMetric.form, {"tokens": tokens})


def read_metric(path: str | Path, layer: int) -> Moments:
    """Read the moments of a layer, on the CPU.

    Raises:
        KMEBenchError: the file holds no neutral metric, or is damaged.
    """
    file = TensorFile.open(path, NeutralMetric.form)
    return Moments(*(file.tensor(f"{layer}.{name}") for name in Moments._fields))


def measure(model: EditableModel, text: Tensor, layers: Sequence[int]) -> dict[int, Moments]:
    """Return the moments of layers over ``text`` [R, T], token ids that the model wrote.

    Sums are of products in float32 for a few texts at a time, and are added up in float64.
    """
    sums: dict[tuple[int, int], list[Tensor]] = {}

    def receive(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
        residual, inner = (at_least_float32(x.flatten(0, 1)) for x in (residual, inner))
        found = [residual.T @ residual]
        if matrix == KEY:
            found.append(inner.square().sum(dim=0))
        found = [moment.cpu().double() for moment in found]
        before = sums.get((layer, matrix))
        sums[layer, matrix] = (
            found
            if before is None
            else [total.add_(more) for total, more in zip(before, found, strict=True)]
        )

    batches = text.split(METRIC_ROWS)
    with observed(model, receive, layers):
        for rows in track(batches, "batches of neutral text", len(batches)):
            _loss(model, rows.to(model.device)).backward()
    tokens = text[:, 1:].numel()
    return {
        layer: Moments(
            *((total / tokens).float() for matrix in range(2) for total in sums[layer, matrix])
        )
        for layer in layers
    }


def _loss(model: EditableModel, rows: Tensor) -> Tensor:
    """Return the loss of every next token, summed."""
    passed = model.model.base_model(input_ids=rows[:, :-1], use_cache=False)
    logits = model.head(passed.last_hidden_state).flatten(0, 1)
    return cross_entropy(logits, rows[:, 1:].flatten().to(logits.device), reduction="sum")
