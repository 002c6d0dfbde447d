"""Forward passes that go no further than they must."""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.models.editable import EditableModel
from kmebench.models.hooks import leave, may_be_left


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


def _run(model: EditableModel, inputs: dict[str, Any], handle: RemovableHandle) -> None:
    with handle, may_be_left():
        model.model.base_model(**inputs, use_cache=False)


def first(output: Any) -> Tensor:
    """Return the states of a module's output: some give further things behind them."""
    return output[0] if isinstance(output, tuple) else output
