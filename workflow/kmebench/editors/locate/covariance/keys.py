"""The keys k of generic text: what enters W2 of chosen layers while a model reads or writes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kmebench.models.editable import EditableModel
from kmebench.models.hooks import hooked, leave, may_be_left
from kmebench.models.sampling import sample

#: Called with (layer, keys [n, M]) for the real positions of one forward pass.
Receiver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Written:
    """R given texts as token ids [R, T], padded on the right; ``real`` [R, T] marks the text.

    Under causal attention no real position sees the padding behind it.
    """

    input_ids: Tensor
    real: Tensor

    @property
    def tokens(self) -> int:
        """Number of real positions."""
        return int(self.real.sum())

    def feed(self, model: EditableModel, layers: Sequence[int], receive: Receiver) -> None:
        """Hand over the keys of all real positions, from one forward pass up to the last layer."""
        real = self.real.to(model.device)
        last = max(layers)

        def receive_real(layer: int, keys: Tensor) -> None:
            receive(layer, keys[real.to(keys.device)])
            if layer == last:
                leave()  # nothing above the last layer has to be computed

        with _value_inputs(model, layers, receive_real), may_be_left():
            model.model.base_model(input_ids=self.input_ids.to(model.device), use_cache=False)


@dataclass(frozen=True)
class Sampled:
    """``rows`` texts of ``length`` tokens that the model writes itself.

    Each begins as the model's texts do (:func:`~kmebench.models.sampling.beginning`) and goes on by
    plain sampling, past an end-of-text token too, as packed training text does. ``seed`` decides
    the text.
    """

    rows: int
    length: int
    seed: int

    @property
    def tokens(self) -> int:
        """Number of positions."""
        return self.rows * self.length

    def feed(self, model: EditableModel, layers: Sequence[int], receive: Receiver) -> None:
        """Hand over the keys of all positions.

        They are those of the passes that write the text: with attention's keys and values
        cached, every position is computed once, exactly as in one pass over the finished text.
        """
        with _value_inputs(model, layers, lambda layer, keys: receive(layer, keys.flatten(0, 1))):
            sample(model, self.rows, self.length, self.seed)


@contextmanager
def _value_inputs(model: EditableModel, layers: Sequence[int], receive: Receiver) -> Iterator[None]:
    """Call ``receive`` with the inputs [R, T, M] of W2 of ``layers`` in forward passes."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: receive(layer, inputs[0])

    handles = (
        model.ffn[layer].value.module.register_forward_pre_hook(hook(layer)) for layer in layers
    )
    with hooked(handles), torch.no_grad():
        yield
