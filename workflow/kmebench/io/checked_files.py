"""Reading the workflow's own files: what is damaged is set aside, never trusted.

A file that is set aside is missing for Snakemake, so the same command makes it again.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kmebench.errors import KMEBenchError

if TYPE_CHECKING:
    import pandas as pd


class DamagedFileError(KMEBenchError):
    """A file of the workflow does not hold what was written to it."""


_USERS: ContextVar[frozenset[Path]] = ContextVar("files of the user's", default=frozenset())


@contextmanager
def users_own(*paths: str | Path | None) -> Iterator[None]:
    """Leave these files as they are in the block, even if they are damaged."""
    before = _USERS.set(_USERS.get() | {Path(path).resolve() for path in paths if path})
    try:
        yield
    finally:
        _USERS.reset(before)


def set_aside(path: str | Path, why: str) -> DamagedFileError:
    """Rename a damaged file to ``{path}.damaged``, unless it is a user's; return the error."""
    if Path(path).resolve() in _USERS.get():
        return DamagedFileError(f"{path} is damaged ({why}); make it again, or name another.")
    try:
        os.replace(path, f"{path}.damaged")
        mend = f"It is set aside as {path}.damaged"
    except OSError:  # a folder that may not be written to
        mend = "Delete it"
    return DamagedFileError(
        f"{path} is damaged ({why}). {mend}; run the same command again, which makes it anew."
    )


@contextmanager
def trusted(path: str | Path) -> Iterator[None]:
    """Read ``path`` in the block; set it aside if it cannot be parsed.

    Raises:
        DamagedFileError: so it is.
    """
    try:
        yield
    except (SafetensorError, ValueError, OSError) as error:
        # What the operating system refuses (missing, not permitted) has a class or a number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise set_aside(path, str(error).strip().partition("\n")[0]) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file of the workflow; see :func:`trusted`."""
    with trusted(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_parquet(path: str | Path) -> "pd.DataFrame":
    """Read a table of the workflow, checking the sums of its pages; see :func:`trusted`."""
    import pandas as pd  # half a second, which the command line's complaints do without

    with trusted(path):
        return pd.read_parquet(path, page_checksum_verification=True)
