"""Low-rank adapters (alpha / r) B A of a model's linear maps, put in and taken out by ``peft``."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from kmebench.edits.weights import LowRank, WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import adapted_modules, layout_of
from kmebench.precision import promoted

#: Module name -> A [r, in] and B [out, r], in float32 or better.
Factors = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def adapters(
    model: EditableModel, rank: int, alpha: float, dropout: float, merged: Factors
) -> Iterator[Factors]:
    """Give the layout's modules trainable adapters in the block; yield their factors, live.

    New ones start from peft's default, B = 0. Where the weights already hold the product of
    ``merged``, the adapter starts from there and the base layer's output is taken less that
    product: the adapter, which adds it, would count it twice. Afterwards the model is what it was.
    """
    names = adapted_modules(model.model, layout_of(model.model.config))
    base = {name: model.model.get_submodule(name) for name in names}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(base[names[0]], Conv1D),
    )
    tuner, live = LoraModel(model.model, config, "default"), dict[str, tuple[Tensor, Tensor]]()
    with ExitStack() as stack:
        stack.callback(tuner.unload)
        for name, module in base.items():
            layer = model.model.get_submodule(name)
            pair = (layer.lora_A["default"], layer.lora_B["default"])
            dtype = promoted(module.weight.dtype)
            live[name] = tuple(part.to(dtype).weight for part in pair)
            if name in merged:
                for parameter, values in zip(live[name], merged[name], strict=True):
                    parameter.data.copy_(values)
                a, b = (parameter.detach().clone() for parameter in live[name])
                hook = _without(a, b, alpha / rank)
                stack.enter_context(module.register_forward_hook(hook))
        yield live


def _without(a: Tensor, b: Tensor, scale: float) -> Callable[..., Tensor]:
    """Return a forward hook that takes the product of ``a`` and ``b`` off a layer's output."""

    def subtract(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = linear(linear(inputs[0].to(a.dtype), a), b) * scale
        return (output - product).to(output.dtype)

    return subtract


def change(model: EditableModel, before: Factors, after: Factors, scale: float) -> WeightDelta:
    """Return ``scale`` (B A after − B A before) as a delta of the adapted modules' weights.

    Its rank is that of the new adapter, or twice as much with one before; deltas in a row
    telescope to the last product. Stored as the weights are: [out, in], or Conv1D's [in, out].
    """
    parts = {}
    for name, (a, b) in after.items():
        left, right = scale * b, a
        if name in before:
            old_a, old_b = (factor.to(a.device) for factor in before[name])
            left, right = torch.cat([left, -scale * old_b], dim=1), torch.cat([right, old_a])
        if isinstance(model.model.get_submodule(name), Conv1D):
            left, right = right.T, left.T
        parts[f"{name}.weight"] = LowRank(left, right)
    return WeightDelta(parts)
