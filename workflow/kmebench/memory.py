"""Out of memory: half as much at once, tried one time."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from kmebench.errors import KMEBenchError

logger = logging.getLogger("kmebench")

Result = TypeVar("Result")


class NoMemoryError(KMEBenchError):
    """Half as much at once did not fit either."""


def halved_if_needed(attempt: Callable[[int], Result], size: int, what: str, mend: str) -> Result:
    """Return ``attempt(size)``; out of memory, ``attempt(size // 2)``.

    ``what`` is named in messages ("editing request 'a'"), ``mend`` ends the error's.

    Raises:
        NoMemoryError: that did not fit either, or ``size`` is 1; says what was asked for.
    """
    try:
        return attempt(size)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if size <= 1:
            raise _exhausted(error, size, what, mend) from error
        logger.warning("out of memory while %s: trying %d at once", what, size // 2)
    # Outside of the block above, which keeps alive what the first attempt held.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return attempt(size // 2)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _exhausted(error, size // 2, what, mend) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an allocation failed; the CPU's and cuBLAS have no error of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("can't allocate memory", "STATUS_ALLOC_FAILED"))


def _exhausted(error: BaseException, size: int, what: str, mend: str) -> NoMemoryError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return NoMemoryError(f"Out of memory while {what}, {size} at once ({reason}): {mend}.")
