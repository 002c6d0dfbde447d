"""The activations from which the gradient of every FFN segment follows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.models.editable import EditableModel
from kmebench.models.hooks import hooked
from kmebench.models.layouts import Projection

KEY, VALUE = 0, 1  # of the two matrices of a layer
#: Called with (layer, matrix, residual [R, T, D], inner [R, T, M]).
Receiver = Callable[[int, int, Tensor, Tensor], None]


@contextmanager
def observed(model: EditableModel, receive: Receiver, layers: Sequence[int]) -> Iterator[None]:
    """Call ``receive`` for both FFN matrices of ``layers`` in every backward pass of the block.

    The gradient of segment j is Σ_t residual_t · inner_tj: for keys, residual is the input of W1
    and inner the loss gradient at its output; for values, residual is the loss gradient at the
    output of W2 and inner its input. All weights stay frozen. The graph begins at the lowest of the
    layers: nothing is gone back to below it.
    """

    def grow_graph(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # Without a leaf that wants gradients there would be no graph.
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def observe(layer: int, matrix: int, projection: Projection) -> Callable[..., None]:
        def on_forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()

            def on_backward(gradient: Tensor) -> None:
                if matrix == KEY:
                    receive(layer, matrix, x, projection.segments(gradient, -1))
                else:
                    receive(layer, matrix, gradient, x)

            output.register_hook(on_backward)

        return on_forward

    def handles() -> Iterator[RemovableHandle]:
        lowest = model.layers[min(layers, default=0)]
        yield lowest.register_forward_pre_hook(grow_graph, with_kwargs=True)
        for layer in layers:
            for matrix, projection in enumerate((model.ffn[layer].key, model.ffn[layer].value)):
                hook = observe(layer, matrix, projection)
                yield projection.module.register_forward_hook(hook)

    with hooked(handles()), torch.enable_grad():
        yield
