"""What a module reads and how the loss depends on what it says: its gradient follows from both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.models.editable import EditableModel
from kmebench.models.hooks import hooked

#: Called with (index of the module, its input [R, T, in], the gradient of its output [R, T, out]).
Receiver = Callable[[int, Tensor, Tensor], None]


@contextmanager
def observed_modules(
    model: EditableModel, modules: Sequence[nn.Module], receive: Receiver, lowest: int
) -> Iterator[None]:
    """Call ``receive`` for each of ``modules`` in every backward pass of the block.

    The gradient of a linear module's weight is Σ_t g_t h_tᵀ, with h_t its input and g_t the loss
    gradient at its output. All weights stay frozen. The graph begins at the layer ``lowest``, below
    which no module may lie: nothing is gone back to below it.
    """

    def grow_graph(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # Without a leaf that wants gradients there would be no graph.
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def observe(index: int) -> Callable[..., None]:
        def on_forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: receive(index, x, gradient))

        return on_forward

    def handles() -> Iterator[RemovableHandle]:
        yield model.layers[lowest].register_forward_pre_hook(grow_graph, with_kwargs=True)
        for index, module in enumerate(modules):
            yield module.register_forward_hook(observe(index))

    with hooked(handles()), torch.enable_grad():
        yield
