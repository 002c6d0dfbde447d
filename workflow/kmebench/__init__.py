"""KME-Bench: a benchmark of knowledge model editing.

The Python interface (docs/python.md) is here by its short names; it is imported, and torch with
it, when one of them is first used.
"""
# ruff: noqa: F403, F405 (the star is for type checkers; a test compares the two lists)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmebench.api import *

__version__ = "0.2.0"
__all__ = [
    "Edit",
    "EditRequest",
    "KMEBenchError",
    "Model",
    "Result",
    "edit",
    "editor",
    "fact",
    "likeliest",
    "load",
    "next_token",
    "save",
    "says",
]


def __getattr__(name: str) -> Any:
    """Import the interface when it is asked for (PEP 562)."""
    if name in __all__:
        return getattr(import_module("kmebench.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names, for completion."""
    return sorted({*globals(), *__all__})
