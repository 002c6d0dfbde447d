"""Forward passes that go no further than they must."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.models.hooks import forward_replaced, leave, may_be_left
from kmebench.precision import at_least_float32


def input_of(model: EditableModel, module: nn.Module, **inputs: Any) -> Tensor:
    """Run the model on ``inputs`` until ``module`` would begin; return its input states."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> NoReturn:
        seen.append(args[0])
        leave()

    _run(model, inputs, module.register_forward_pre_hook(stop))
    return seen[0]


@dataclass(frozen=True)
class Call:
    """What the model hands to one of its layers besides the states."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, states: Tensor) -> Tensor:
        """Run the layer on other states, all else being the same."""
        return first(self.layer(states, *self.args, **self.kwargs))


def layer_calls(model: EditableModel, **inputs: Any) -> list[Call]:
    """Return what the model hands to each of its layers for ``inputs``; no layer is run.

    Layers of different kinds are handed different things: in Gemma 3 mask and rotary embedding.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []

    def recorder(layer: nn.Module) -> Callable[..., Tensor]:
        def record(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(Call(layer, args, kwargs))
            entered.append(states)
            return entered[0]  # not ``states``: GPT-J hands on the first item of what it gets

        return record

    with ExitStack() as stack:
        for layer in model.layers:
            stack.enter_context(forward_replaced(layer, recorder(layer)))
        _run(model, inputs, model.norm.register_forward_pre_hook(lambda *_: leave()))
    return calls


def input_and_output(
    model: EditableModel, module: nn.Module, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Run the model on ``inputs`` until ``module`` has run; return its input and output states."""
    seen: list[tuple[Tensor, Tensor]] = []

    def stop(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> NoReturn:
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, first(output)))
        leave()

    _run(model, inputs, module.register_forward_hook(stop, with_kwargs=True))
    return seen[0]


@torch.no_grad()
def at_last_tokens(
    model: EditableModel, texts: Sequence[Sequence[int]], module: nn.Module, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return input and output of ``module`` at the last token of each text, [N, ...] both.

    ``texts`` are token ids, ``chunk_size`` of which pass through the model at a time. In float32
    or better.
    """
    order: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    for chunk in length_sorted_chunks([len(ids) for ids in texts], chunk_size):
        batch = model.collate([Encoded(tuple(texts[i]), n_target=0) for i in chunk])
        last = torch.tensor([len(texts[i]) - 1 for i in chunk])
        states = input_and_output(model, module, input_ids=batch.input_ids)
        found.append(tuple(at_least_float32(s[range(len(chunk)), last]) for s in states))
        order += chunk
    back = torch.tensor(order).argsort()
    inputs, outputs = (torch.cat(parts)[back] for parts in zip(*found, strict=True))
    return inputs, outputs


def _run(model: EditableModel, inputs: dict[str, Any], handle: RemovableHandle) -> None:
    with handle, may_be_left():
        model.model.base_model(**inputs, use_cache=False)


def first(output: Any) -> Tensor:
    """Return the states of a module's output: some give further things behind them."""
    return output[0] if isinstance(output, tuple) else output
