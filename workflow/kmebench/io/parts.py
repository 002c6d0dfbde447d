"""Parts of a file that takes hours: a stage that was stopped or killed goes on behind them."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kmebench.io import origins
from kmebench.io.files import write_text
from kmebench.io.logs import track

logger = logging.getLogger("kmebench")


class Parts:
    """Finished parts of the file ``path``, in a folder beside it until the file is complete.

    They are no output of the rule, because Snakemake deletes those of a killed job. Parts of
    another ``identity`` (JSON), which is all that they depend on, are deleted.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._folder = Path(f"{path}.partial")
        self._identity = json.dumps(identity, sort_keys=True)

    @classmethod
    def of_job(cls, job: Any) -> "Parts":
        """Return the parts of the first output of a job, a script's ``snakemake``."""
        told = {"inputs": origins.digest_of(job.input), "params": dict(job.params.items())}
        return cls(job.output[0], told)

    def files(
        self, count: int, size: int, write: Callable[[Path, slice], None], description: str
    ) -> list[Path]:
        """Return the files of all parts of ``count`` items, ``size`` items each.

        ``write`` is given the path of a part that is missing, and its items.
        """
        found = self._found()
        starts = range(0, count, size)
        if found:
            logger.info("resumed behind %d of %d parts", len(found), len(starts))
        missing = [start for start in starts if str(start) not in found]
        for start in track(missing, description, len(missing)):
            write(self._folder / str(start), slice(start, start + size))
        return [self._folder / str(start) for start in starts]

    def clear(self) -> None:
        """Remove all parts (the file is complete)."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _found(self) -> set[str]:
        """Return the names of the parts of this identity."""
        note = self._folder / "identity.json"
        if not note.is_file() or note.read_text(encoding="utf-8") != self._identity:
            self.clear()
            write_text(note, self._identity)
        return {file.name for file in self._folder.iterdir() if file.name.isdecimal()}
