"""What a Snakemake script prints, where it goes, and how it ends."""

import errno
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from kmebench.errors import KMEBenchError

logger = logging.getLogger("kmebench")

Item = TypeVar("Item")
#: Longest time in seconds without a word in a log.
_SILENCE = 300.0


@contextmanager
def script_log(snakemake: Any) -> Iterator[None]:
    """Send a script's output to its log file, and end it with one sentence on a user's error.

    The sentence goes to the log (Snakemake shows it with ``--show-failed-logs``) and to the
    terminal; an unexpected exception keeps its traceback in the log. A disk that is full or may
    not be written to is the user's to mend, too.
    """
    terminal = sys.stderr
    log_file = snakemake.log[0] if snakemake.log else None
    # Not closed: tracebacks of the interpreter's end still go there.
    stream: TextIO = (
        open(log_file, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        if log_file
        else terminal
    )
    sys.stdout = sys.stderr = stream
    logging.basicConfig(
        stream=stream, level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    _TERMINAL["stream"] = terminal
    _TERMINAL["title"] = f"{snakemake.rule} {' '.join(str(w) for w in snakemake.wildcards)}".strip()
    try:
        yield
    except Exception as error:
        told = complaint(error)
        if told is None:
            raise
        message = f"{snakemake.rule}: {told}"
        print(message, file=stream)
        if stream is not terminal:
            print(message, file=terminal)
        sys.exit(1)
    finally:
        _TERMINAL.update(stream=None, title="")


def complaint(error: Exception) -> str | None:
    """What a user is told; None for what is not theirs to mend."""
    if isinstance(error, KMEBenchError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which reporting does without
        return f"Out of memory ({error}): choose a smaller dtype, device: balanced or a larger GPU."
    for number, mend in _DISK.items():
        # safetensors, written in Rust, tells the number in its text only.
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return f"A file could not be used ({error}): {mend}; nothing finished is lost."
    return None


_DISK = {
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "your quota is used up; make room and run the same command again",
    errno.EROFS: "the file system is read-only; move the results (pathvars in the config)",
    errno.EACCES: "you may not; mend its permissions and run the same command again",
    errno.EPERM: "it is another user's; mend its owner and run the same command again",
}


_TERMINAL: dict[str, Any] = {"stream": None, "title": ""}


def announce(text: str, level: int = logging.INFO) -> None:
    """Log what a user is to see at once: a script says it on the terminal, too."""
    logger.log(level, text)
    terminal = _TERMINAL["stream"]
    if terminal not in (None, sys.stderr):  # the log is a file
        print(f"{_TERMINAL['title']}: {text}", file=terminal, flush=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say on a terminal what the block does, while it does it; elsewhere be quiet."""
    if not sys.stderr.isatty():
        yield
        return
    # Only a terminal needs it.
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield ``items`` with progress: a bar on a terminal, lines in a log, and the time left."""
    stream = _TERMINAL["stream"] or sys.stderr
    description = f"{_TERMINAL['title']}: {description}" if _TERMINAL["title"] else description
    if not stream.isatty():
        yield from _track_in_log(items, description, total)
        return
    # Only a terminal needs it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(file=stream)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


def _track_in_log(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Log at every tenth of the way, and when :data:`_SILENCE` has passed."""
    began = shown_at = time.monotonic()
    shown = 0
    for done, item in enumerate(items, start=1):
        yield item
        now, tenth = time.monotonic(), done * 10 // max(total, 1)
        if tenth > shown or now - shown_at > _SILENCE:
            shown, shown_at = tenth, now
            left = (now - began) / done * (total - done)
            logger.info("%s: %d of %d%s", description, done, total, _left(left))


def _left(seconds: float) -> str:
    """Say how long something will still take; nothing of what ends at once."""
    if seconds < 60:
        return ""
    return f", {seconds / 3600:.1f} h left" if seconds >= 3600 else f", {seconds / 60:.0f} min left"
