"""The activations from which the gradient of every FFN segment follows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from kmebench.editors.gradients import observed_modules
from kmebench.models.editable import EditableModel

KEY, VALUE = 0, 1  # of the two matrices of a layer
#: Called with (layer, matrix, residual [R, T, D], inner [R, T, M]).
Receiver = Callable[[int, int, Tensor, Tensor], None]


@contextmanager
def observed(model: EditableModel, receive: Receiver, layers: Sequence[int]) -> Iterator[None]:
    """Call ``receive`` for both FFN matrices of ``layers`` in every backward pass of the block.

    The gradient of segment j is Σ_t residual_t · inner_tj: for keys, residual is the input of W1
    and inner the loss gradient at its output; for values, residual is the loss gradient at the
    output of W2 and inner its input. See :func:`observed_modules`.
    """
    places = [(layer, matrix) for layer in layers for matrix in (KEY, VALUE)]
    pairs = [(model.ffn[layer].key, model.ffn[layer].value) for layer in layers]
    projections = [projection for pair in pairs for projection in pair]

    def told(index: int, x: Tensor, gradient: Tensor) -> None:
        layer, matrix = places[index]
        if matrix == KEY:
            receive(layer, matrix, x, projections[index].segments(gradient, -1))
        else:
            receive(layer, matrix, gradient, x)

    modules = [projection.module for projection in projections]
    with observed_modules(model, modules, told, min(layers, default=0)):
        yield
