"""Ending a long run in good order when its machine is taken away."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kmebench.errors import KMEBenchError

#: What a scheduler sends before a time limit, or before it gives the machine to somebody else.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptedError(KMEBenchError):
    """A run was asked to stop, and has saved what it has done."""


@contextmanager
def noted_signals() -> Iterator[Callable[[], str | None]]:
    """Note SIGTERM and SIGUSR1 while the block runs, instead of ending at once.

    Yields a function that returns the name of the signal received, or None. A second signal ends
    the process as it would without this. Signals can be noted in the main thread only.
    """
    received: list[str] = []
    with _handled(received.append):
        yield lambda: received[0] if received else None


@contextmanager
def ended_by_signals(error: Callable[[str], Exception]) -> Iterator[None]:
    """Raise ``error`` of the name of the signal when SIGTERM or SIGUSR1 comes in the block.

    For what can be made again from what is saved. See :func:`noted_signals`.
    """

    def end(name: str) -> None:
        raise error(name)

    with _handled(end):
        yield


@contextmanager
def _handled(handle: Callable[[str], None]) -> Iterator[None]:
    """Call ``handle`` with the name of the first signal; obey a second one as usual."""
    usual = {number: signal.getsignal(number) for number in SIGNALS}

    def first(number: int, frame: FrameType | None) -> None:
        _restore(usual)
        handle(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, first)
    try:
        yield
    finally:
        _restore(usual)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
