"""The keys k of generic text: what enters W2 of chosen layers while a model reads or writes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kmebench.models.editable import EditableModel
from kmebench.models.encoding import put_before
from kmebench.models.hooks import hooked, leave, may_be_left

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

    Each begins as the model's texts do (:func:`beginning`) and goes on by plain sampling, past
    an end-of-text token too, as packed training text does. ``seed`` decides the text.
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


def sample(model: EditableModel, rows: int, length: int, seed: int) -> Tensor:
    """Sample texts at temperature 1; return token ids [rows, length], on the CPU.

    Random numbers are drawn on the CPU, and a token is the first whose cumulated probability
    passes its number: torch.multinomial is twenty times slower on the CPU, and on CUDA a
    cumulated sum is not deterministic.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(beginning(model)[:length]).expand(rows, -1)
    written, cache = ids, None
    while True:
        output = model.model.base_model(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=True
        )
        if written.shape[1] == length:
            return written
        cache = output.past_key_values
        logits = model.model.get_output_embeddings()(output.last_hidden_state[:, -1])
        cumulated = logits.to("cpu", torch.float32).softmax(dim=-1).cumsum(dim=-1)
        # Below the last sum, not below 1: rounding must not lead past the vocabulary.
        drawn = torch.rand(rows, 1, generator=generator) * cumulated[:, -1:]
        ids = torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[1] - 1)
        written = torch.cat([written, ids], dim=1)


def beginning(model: EditableModel) -> list[int]:
    """Return the tokens a text begins with: what the tokenizer puts there, else BOS, else EOS."""
    tokenizer = model.tokenizer
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return put_before(tokenizer) or [next(c for c in candidates if c is not None)]


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
