"""Forward passes that go no further than they must."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.models.hooks import leave, may_be_left
from kmebench.precision import at_least_float32


@dataclass(frozen=True)
class Call:
    """What the model hands to one of its modules: states, then everything else."""

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, states: Tensor) -> Tensor:
        """Run a module of the same kind on other states, all else being the same."""
        return first(module(states, *self.args, **self.kwargs))


def call_of(model: EditableModel, module: nn.Module, **inputs: Any) -> Call:
    """Run the model on ``inputs`` until ``module`` would begin; return its arguments."""
    seen: list[Call] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        seen.append(Call(args[0], args[1:], kwargs))
        leave()

    _run(model, inputs, module.register_forward_pre_hook(stop, with_kwargs=True))
    return seen[0]


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
