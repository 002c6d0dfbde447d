"""Hooks on modules: registered while a block runs, and forward passes that end inside one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks while the block runs; a generator registers them one by one."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def on_output(hook: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Return a forward hook that puts ``hook(input, output)`` in place of a module's output."""

    def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return hook(inputs[0], output)

    return replace


class _LeftError(Exception):
    """Ends a forward pass from inside a hook; never leaves :func:`may_be_left`."""


def leave() -> NoReturn:
    """End the forward pass under way: what is wanted of it is there."""
    raise _LeftError


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else while the block runs."""
    own = vars(module).get("forward")  # accelerate puts one there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def may_be_left() -> Iterator[None]:
    """Run a forward pass that a hook may end by :func:`leave`."""
    with suppress(_LeftError):
        yield
