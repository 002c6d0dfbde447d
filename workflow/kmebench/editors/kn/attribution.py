"""Integrated gradients of FFN neurons (Dai et al. 2022, "Knowledge neurons", eq. 4 and 5).

A neuron is the coefficient a_j of value v_j (the input of W2) at the last token of a prompt.
With P the probability of one token after the prompt, as a function of the M neurons of one
layer, all scaled together,

    Attr(l, j) = a_j · 1/m Σ_{i=1..m} ∂P/∂a_j at (i/m) a

which sums over j to P(a) − P(0) as m grows: the mean is the right Riemann sum of an integral.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kmebench.models.editable import EditableModel
from kmebench.models.hooks import hooked
from kmebench.precision import at_least_float32


@torch.no_grad()
def attribute(
    model: EditableModel, ids: Sequence[int], answer: int, *, steps: int, micro_batch: int
) -> Tensor:
    """Return Attr(l, j) of every neuron for the prompt ``ids`` [T] and the token ``answer``.

    [L, M] in float32, or float64 for a float64 model. The L·m points are rows of batches of
    ``micro_batch``. Only the last token depends on them: under causal attention all before it is
    read once, and its keys and values are shared by all points.
    """
    tokens = torch.tensor([ids], device=model.device)
    past = DynamicCache(config=model.model.config)
    if len(ids) > 1:
        model.model.base_model(input_ids=tokens[:, :-1], past_key_values=past, use_cache=True)
    last = tokens[:, -1:]
    activations = _activations(model, last, past)  # [L, M]
    layers = torch.arange(model.n_layers, device=model.device).repeat_interleave(steps)  # [L·m]
    scales = (torch.arange(steps, device=model.device) + 1).repeat(model.n_layers) / steps
    total = torch.zeros_like(activations)
    for chunk in torch.arange(len(layers), device=model.device).split(micro_batch):
        layer = layers[chunk]
        points = scales[chunk, None].to(total) * activations[layer]  # [R, M]
        total.index_add_(0, layer, _gradients(model, last, past, layer, points, answer))
    return activations * total / steps


def _activations(model: EditableModel, last: Tensor, past: DynamicCache) -> Tensor:
    """Return the neurons of all layers at the token ``last`` [1, 1] after ``past``, [L, M]."""
    seen: list[Tensor] = []
    handles = (
        ffn.value.module.register_forward_pre_hook(
            lambda _module, inputs: seen.append(at_least_float32(inputs[0][0, -1]))
        )
        for ffn in model.ffn
    )
    with hooked(handles):
        # A forward pass appends to its cache.
        model.model.base_model(input_ids=last, past_key_values=copy.deepcopy(past), use_cache=True)
    return torch.stack([neurons.to(model.device) for neurons in seen])


@torch.enable_grad()
def _gradients(
    model: EditableModel,
    last: Tensor,
    past: DynamicCache,
    layers: Tensor,
    points: Tensor,
    answer: int,
) -> Tensor:
    """Return ∂P/∂a [R, M], row r with the neurons of ``layers[r]`` at ``points[r]``."""
    points = points.requires_grad_()
    cache = copy.deepcopy(past)
    cache.batch_repeat_interleave(len(points))
    with _neurons_replaced(model, layers, points):
        logits = model.model(
            input_ids=last.expand(len(points), 1), past_key_values=cache, use_cache=True
        ).logits[:, -1]  # [R, vocabulary]
    probability = at_least_float32(logits).softmax(dim=-1)[:, answer]
    (gradient,) = torch.autograd.grad(probability.sum(), points)  # rows do not mix
    return gradient


@contextmanager
def _neurons_replaced(model: EditableModel, layers: Tensor, points: Tensor) -> Iterator[None]:
    """Put ``points[r]`` in place of the last token's neurons of ``layers[r]``, in row r only."""

    def replace(layer: int) -> Callable[..., Tensor]:
        chosen = (layers == layer)[:, None, None]

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            x = inputs[0]  # [R, 1, M]
            return torch.where(chosen.to(x.device), points[:, None].to(x), x)

        return before

    handles = (
        model.ffn[layer].value.module.register_forward_pre_hook(replace(layer))
        for layer in layers.unique().tolist()
    )
    with hooked(handles):
        yield
