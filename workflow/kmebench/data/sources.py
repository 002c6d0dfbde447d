"""Bring a data file here: mirror folder first, then https, always checked, never half."""

import logging
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from kmebench.errors import DataError
from kmebench.io import origins
from kmebench.io.files import atomic_path, sha256_of
from kmebench.io.logs import track

logger = logging.getLogger("kmebench")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CHUNK = 1 << 16
MEND = (
    "put the file into a mirror folder (config key data_mirror or environment variable "
    "KMEBENCH_DATA_MIRROR)"
)


@dataclass(frozen=True)
class Source:
    """Where one data file comes from.

    ``filenames`` are looked for in the mirror folder; ``url`` and ``sha256`` (of the file as
    downloaded) and ``member`` (a file inside a zip archive) are optional.
    """

    filenames: Sequence[str]
    url: str | None = None
    sha256: str | None = None
    member: str | None = None


@dataclass(frozen=True)
class Patience:
    """How a download deals with a poor network."""

    timeout: float = 30.0  # seconds without a byte
    retries: int = 4  # tries after the first
    backoff: float = 1.0  # seconds before the second try; doubles


def fetch(
    source: Source, destination: str | Path, mirror: str = "", patience: Patience | None = None
) -> str:
    """Bring ``source`` to ``destination``, which appears only when complete and checked.

    Returns the digest of the file as it was found or downloaded (see :mod:`kmebench.io.origins`).

    Raises:
        DataError: the file is nowhere, is not what it should be, or cannot be downloaded.
    """
    destination = Path(destination)
    found = _in_mirror(source, mirror)
    if found is not None:
        logger.info("taken from the mirror: %s", found)
        return _take(found, source, destination, str(found))
    if source.url is None:
        place = f"not in the mirror folder {mirror}" if mirror else "no mirror folder is set"
        raise DataError(f"{source.filenames[0]} has no URL and is {place}; {MEND}.")
    partial = destination.parent / f".{destination.name}.download"
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download(source.url, partial, patience or Patience())
        return _take(partial, source, destination, source.url)
    finally:
        partial.unlink(missing_ok=True)


def _in_mirror(source: Source, mirror: str) -> Path | None:
    if not mirror:
        return None
    if not Path(mirror).expanduser().is_dir():
        raise DataError(f"The mirror folder {mirror} does not exist.")
    return origins.mirror_file(source.filenames, mirror)


def _take(path: Path, source: Source, destination: Path, where: str) -> str:
    """Check a file that has arrived and copy it, or its member, to its destination."""
    try:
        digest = origins.digest(path)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror}).") from error
    _check(path, source, where)
    _deliver(path, source, destination)
    return digest


def _check(path: Path, source: Source, where: str) -> None:
    if source.sha256 is None:
        return
    found = sha256_of(path)
    if found != source.sha256:
        raise DataError(
            f"{where} has the sha256 {found}, expected {source.sha256}: it is damaged or another "
            f"version; correct the config or {MEND}."
        )


def _deliver(path: Path, source: Source, destination: Path) -> None:
    """Copy the file, or its member, to its destination."""
    with atomic_path(destination) as temporary:
        if source.member is None:
            shutil.copyfile(path, temporary)
            return
        try:
            # Only this member's bytes are read; names inside the archive are never paths here.
            with (
                zipfile.ZipFile(path) as archive,
                archive.open(source.member) as member,
                open(temporary, "wb") as stream,
            ):
                shutil.copyfileobj(member, stream)
        except KeyError as error:
            raise DataError(f"{path.name} holds no member {source.member!r}.") from error
        except zipfile.BadZipFile as error:
            raise DataError(f"{path.name} is no intact zip archive ({error}).") from error


class _TransientError(Exception):
    """A failure that may pass."""


def _download(url: str, partial: Path, patience: Patience) -> None:
    """Download with retries; a broken transfer starts afresh (edit sets are a few megabytes)."""
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
        raise DataError(f"{url} is not https; {MEND}.")
    reason = ""
    for attempt in range(patience.retries + 1):
        if attempt:
            wait = patience.backoff * 2 ** (attempt - 1)
            logger.info("%s: %s; trying again in %gs", url, reason, wait)
            time.sleep(wait)
        try:
            _transfer(url, partial, patience.timeout)
            return
        except (_TransientError, requests.ConnectionError, requests.Timeout) as error:
            reason = str(error) if isinstance(error, _TransientError) else _network_reason(error)
    raise DataError(
        f"{url} could not be downloaded in {patience.retries + 1} tries ({reason}); try again "
        f"later or {MEND}."
    )


def _network_reason(error: requests.RequestException) -> str:
    stalled = isinstance(error, requests.Timeout) or "timed out" in str(error)
    return "the connection stalled" if stalled else f"{type(error).__name__}"


def _transfer(url: str, partial: Path, timeout: float) -> None:
    """Make one try."""
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts what is written
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _TransientError(f"the server answered {answer.status_code}")
        if not answer.ok:
            raise DataError(f"{url} answered {answer.status_code} {answer.reason}; {MEND}.")
        expected = answer.headers.get("Content-Length")
        written = 0
        blocks = -(-int(expected or 0) // _CHUNK)
        with open(partial, "wb") as stream:
            try:
                for block in track(answer.iter_content(_CHUNK), "blocks downloaded", blocks):
                    written += stream.write(block)
            except requests.exceptions.ChunkedEncodingError as error:
                raise _TransientError(f"the connection broke after {written} bytes") from error
    if expected is not None and written < int(expected):
        raise _TransientError(f"the connection ended after {written} of {expected} bytes")
