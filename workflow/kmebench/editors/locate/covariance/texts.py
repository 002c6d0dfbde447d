"""Where generic text comes from: the model itself, a local file, or a Hugging Face data set."""

import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kmebench.editors.locate.covariance.keys import Sampled, Written
from kmebench.errors import DataError
from kmebench.models.editable import EditableModel

#: Batches whose texts are sorted together by length, so that little is padded.
_WINDOW = 16
#: Records a streamed data set is shuffled among.
_SHUFFLED = 10_000


@dataclass(frozen=True)
class TextSettings:
    """Which text the keys are taken from; the section ``covariance`` of the config."""

    text: Mapping[str, Any] = field(default_factory=lambda: {"source": "self"})
    tokens: int = 49_152
    length: int = 128  # tokens of one text at most; longer ones are cut into several
    batch_size: int = 128  # texts in one forward pass
    seed: int = 0  # of what is sampled, and of the order of a data set


def text_batches(
    model: EditableModel, settings: TextSettings, start: int = 0
) -> Iterator[Sampled | Written]:
    """Yield the batches of the text from number ``start`` on.

    They hold exactly ``settings.tokens`` tokens, or all of a text that is shorter. Every batch is
    a function of its number, so that a stage can go on where it stopped.

    Raises:
        DataError: the text cannot be had.
    """
    length = min(settings.length, model.context or settings.length)
    if settings.text["source"] == "self":
        yield from _sampled(settings, length, start)
        return
    texts = {"file": read_file, "dataset": read_dataset}[settings.text["source"]](
        settings.text, settings.seed
    )
    pieces = _limited(_pieces(model, texts, length), settings.tokens)
    for number, rows in enumerate(_sorted_batches(pieces, settings.batch_size)):
        if number >= start:
            yield _padded(rows, model.pad_id)


def _sampled(settings: TextSettings, length: int, start: int) -> Iterator[Sampled]:
    """Yield batches of whole texts; what is then left of the tokens is one shorter text."""
    whole, rest = divmod(settings.tokens, length)
    shapes = [
        (min(settings.batch_size, whole - done), length)
        for done in range(0, whole, settings.batch_size)
    ]
    shapes += [(1, rest)] if rest else []
    for number, (rows, width) in enumerate(shapes):
        if number >= start:
            yield Sampled(rows, width, seed=settings.seed * len(shapes) + number)


def read_file(spec: Mapping[str, Any], seed: int) -> Iterator[str]:
    """Yield the paragraphs (separated by empty lines) of a UTF-8 file, in their order.

    Raises:
        DataError: the file is not there, cannot be read or is not UTF-8.
    """
    path = Path(spec["path"]).expanduser()
    try:
        with open(path, encoding="utf-8-sig") as stream:
            yield from _paragraphs(stream)
    except FileNotFoundError:
        raise DataError(f"covariance.text.path: there is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"covariance.text.path: {path} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise DataError(
            f"covariance.text.path: {path} cannot be read ({error.strerror})."
        ) from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in itertools.chain(lines, [""]):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []


def read_dataset(spec: Mapping[str, Any], seed: int) -> Iterator[str]:
    """Yield the texts of a Hugging Face data set, streamed and shuffled.

    ``spec``: name, config, split, column, revision.

    Raises:
        DataError: the package ``datasets`` is missing, or the data set or its column is.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            "covariance.text: the source 'dataset' needs the package datasets (pip install "
            "datasets); the sources 'self' and 'file' do not."
        ) from error
    try:
        stream = datasets.load_dataset(
            spec["name"],
            spec.get("config"),
            split=spec["split"],
            revision=spec["revision"],
            streaming=True,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"covariance.text: {spec['name']} cannot be streamed: {error}") from error
    for row in stream.shuffle(seed=seed, buffer_size=_SHUFFLED):
        if spec["column"] not in row:
            raise DataError(
                f"covariance.text.column: {spec['name']} has no column {spec['column']!r}; "
                f"it has {', '.join(row)}."
            )
        text = row[spec["column"]]
        if not isinstance(text, str):
            raise DataError(
                f"covariance.text.column: {spec['column']!r} of {spec['name']} holds a "
                f"{type(text).__name__}, expected texts."
            )
        yield text


def _pieces(model: EditableModel, texts: Iterable[str], length: int) -> Iterator[list[int]]:
    """Yield texts as token ids, cut into pieces that each begin as a text does."""
    for text in texts:
        yield from model.encode_pieces(text, length)


def _limited(pieces: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield pieces until there are ``tokens`` tokens; the last one is cut."""
    left = tokens
    for ids in pieces:
        if ids:
            yield ids[:left]
            left -= len(ids)
        if left <= 0:
            return


def _sorted_batches(pieces: Iterable[list[int]], size: int) -> Iterator[list[list[int]]]:
    window: list[list[int]] = []
    for ids in pieces:
        window.append(ids)
        if len(window) == size * _WINDOW:
            yield from _split(sorted(window, key=len), size)
            window = []
    yield from _split(sorted(window, key=len), size)


def _split(pieces: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(pieces), size):
        yield pieces[start : start + size]


def _padded(rows: list[list[int]], pad_id: int) -> Written:
    lengths = torch.tensor([len(ids) for ids in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    return Written(input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None])
