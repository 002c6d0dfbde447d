"""The gradient cache and the path files, both safetensors.

A gradient cache holds, for the E requests of a data set, ``l2`` and ``signed_sum``
[E, L, 2, M] float32, ``answers`` [E, A] int32 (the unedited model's argmax at the answer
positions, padded with −1) and ``seconds`` [E] float32. It depends on the model and the data
only: every number of paths, score and selection reads the same cache. It is written row by
row, so it may be larger than memory (Llama-3 8B: 7 MB per request); so are its checksums,
``crc32`` [E, 4] int64, one for every row of the four tensors.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors import needs
from kmebench.editors.pac.impact import Impact, trace
from kmebench.editors.pac.paths import Paths, select_paths
from kmebench.errors import KMEBenchError
from kmebench.io.checked_files import set_aside, trusted
from kmebench.io.files import atomic_path
from kmebench.io.headers import read_header
from kmebench.io.parts import Parts
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.models.editable import EditableModel

_GRADIENTS = "kmebench.gradients.v2"
_REQUESTS_AT_ONCE = 20
#: Shape and dtype of the tensors of a file, by name.
_Layout = dict[str, tuple[tuple[int, ...], np.dtype]]
_NAMES = {np.dtype("float32"): "F32", np.dtype("int32"): "I32", np.dtype("int64"): "I64"}
#: The tensors of a gradient cache, in the order of their checksums.
_SUMMED = ("l2", "signed_sum", "answers", "seconds")


def cache_gradients(parts: Parts, model: EditableModel, requests: Sequence[EditRequest]) -> None:
    """Trace every request on ``model`` and write the gradient cache, going on behind ``parts``."""
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    shape = (model.n_layers, model.ffn_width)
    case_ids = [r.case_id for r in requests]
    longest = max(e.n_target for e in encoded)

    def write(path: Path, items: slice) -> None:
        write_gradients(path, case_ids[items], shape, longest, _impacts(model, requests[items]))

    files = parts.files(len(requests), _REQUESTS_AT_ONCE, write, "parts of the gradients")
    rows = chain.from_iterable(GradientCache.open(file).rows() for file in files)
    write_gradients(parts.path, case_ids, shape, longest, rows)
    parts.clear()


def _impacts(
    model: EditableModel, requests: Sequence[EditRequest]
) -> Iterator[tuple[Impact, float]]:
    """Trace one request at a time, and measure it.

    Rows of a batch would only add padding, and the time of a request is what an edit in
    consecutive mode really spends on tracing.
    """
    for request in requests:
        start = time.perf_counter()
        impact = trace(model, [request])
        yield impact, time.perf_counter() - start


def write_gradients(
    path: str | Path,
    case_ids: Sequence[str],
    shape: tuple[int, int],
    longest_answer: int,
    impacts: Iterable[tuple[Impact, float]],
) -> None:
    """Stream impacts with their seconds per request into a gradient cache.

    ``shape`` is (L, M). ``impacts`` must cover the requests in the order of ``case_ids``.
    """
    n_layers, width = shape
    scores = (len(case_ids), n_layers, 2, width)
    layout: _Layout = {
        "l2": (scores, np.dtype("float32")),
        "signed_sum": (scores, np.dtype("float32")),
        "answers": ((len(case_ids), longest_answer), np.dtype("int32")),
        "seconds": ((len(case_ids),), np.dtype("float32")),
        "crc32": ((len(case_ids), len(_SUMMED)), np.dtype("int64")),
    }
    metadata = {_GRADIENTS: json.dumps(list(case_ids))}
    with atomic_path(path) as temporary:
        tensors = _allocate(temporary, layout, metadata)
        tensors["answers"][:] = -1
        row = 0
        for impact, seconds in impacts:
            rows = slice(row, row + len(impact.answers))
            tensors["l2"][rows] = impact.l2.cpu().numpy()
            tensors["signed_sum"][rows] = impact.signed_sum.cpu().numpy()
            tensors["seconds"][rows] = seconds
            for offset, answer in enumerate(impact.answers):
                tensors["answers"][row + offset, : len(answer)] = answer
            for column, name in enumerate(_SUMMED):
                tensors["crc32"][rows, column] = _crc32(tensors[name][rows])
            row += len(impact.answers)
        for tensor in tensors.values():
            tensor.flush()


def _crc32(rows: np.ndarray) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(row).data) for row in rows]


def _allocate(path: Path, layout: _Layout, metadata: dict[str, str]) -> dict[str, np.memmap]:
    """Lay out a safetensors file of the final size and map its tensors for writing."""
    header: dict[str, object] = {"__metadata__": metadata}
    begins: dict[str, int] = {}
    offset = 0
    for name, (shape, dtype) in layout.items():
        begins[name] = offset
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)
    start = 8 + len(encoded)
    return {
        name: np.memmap(path, dtype, "r+", offset=start + begins[name], shape=shape)
        for name, (shape, dtype) in layout.items()
    }


@dataclass(frozen=True)
class GradientCache:
    """Read access to a gradient cache; scores are read in groups, never all at once."""

    path: Path
    case_ids: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> "GradientCache":
        """Open a cache.

        Raises:
            KMEBenchError: the file is no gradient cache, or damaged.
        """
        return cls(Path(path), tuple(read_header(path, _GRADIENTS)))

    def group_scores(self, kind: str, size: int) -> Iterator[Tensor]:
        """Yield [L, 2, M]: scores of each group of ``size`` consecutive requests, summed.

        Raises:
            DamagedFileError: a row is not what was written; so do the other methods.
        """
        for start in range(0, len(self.case_ids), size):
            yield self._rows(kind, slice(start, start + size)).sum(dim=0)

    def answers(self) -> Tensor:
        """Return the unedited model's answers, [E, A] padded with −1."""
        return self._rows("answers", slice(None))

    def seconds(self) -> Tensor:
        """Return the tracing time of every request, [E]."""
        return self._rows("seconds", slice(None))

    def rows(self) -> Iterator[tuple[Impact, float]]:
        """Yield the impact and the tracing time of every request of a small file, read at once."""
        columns = (self._rows(name, slice(None)).split(1) for name in _SUMMED)
        for l2, signed_sum, answers, seconds in zip(*columns, strict=True):
            said = tuple(answers[answers >= 0].tolist())
            yield Impact(l2, signed_sum, [said]), float(seconds)

    def _rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor and compare their checksums."""
        with trusted(self.path), safe_open(str(self.path), framework="pt") as stream:
            tensor = stream.get_slice(name)[rows]
            sums = stream.get_tensor("crc32")[rows, _SUMMED.index(name)]
        found = zip(self.case_ids[rows], _crc32(tensor.numpy()), sums.tolist(), strict=True)
        for case_id, is_, was in found:
            if is_ != was:
                raise set_aside(self.path, f"the checksum of {name} of request {case_id!r} differs")
        return tensor


def write_paths(path: str | Path, paths: Paths, cache: GradientCache, need: needs.Paths) -> None:
    """Write selected paths with what an editor needs beside them: answers and tracing time.

    ``need.group`` consecutive requests share their paths.
    """
    tensors = {
        "positive": paths.positive.int(),
        "negative": paths.negative.int(),
        "positive_scores": paths.positive_scores.float(),
        "answers": cache.answers(),
        "seconds": cache.seconds(),
    }
    facts = {"case_ids": cache.case_ids, "settings": asdict(need)}
    write_tensors(path, tensors, needs.Paths.form, facts)


@dataclass(frozen=True)
class Route:
    """What PAC needs to know about one request.

    ``positive`` [L, 2, N] and ``negative`` [L, 2, K] are segment indices; ``answer`` is the
    unedited model's own answer as token ids; ``seconds`` the time its tracing took.
    """

    positive: Tensor
    negative: Tensor
    answer: tuple[int, ...]
    seconds: float


class PathFile:
    """Selected paths by case_id."""

    def __init__(self, path: str | Path) -> None:
        """Open a file of :func:`write_paths`.

        Raises:
            KMEBenchError: the file is no path file, or damaged.
        """
        file = TensorFile.open(path, needs.Paths.form)
        self.path = file.path
        self._row = {c: row for row, c in enumerate(file.facts["case_ids"])}
        self._group = file.facts["settings"]["group"]
        self._tensors = {name: file.tensor(name) for name in file.digests}

    def route(self, case_id: str) -> Route:
        """Return the route of one request.

        Raises:
            KMEBenchError: the request was not traced.
        """
        if case_id not in self._row:
            raise KMEBenchError(
                f"{self.path} holds no paths for request {case_id!r}; it was made from other "
                "data: delete it and run the workflow again."
            )
        row = self._row[case_id]
        answer = self._tensors["answers"][row]
        return Route(
            positive=self._tensors["positive"][row // self._group].long(),
            negative=self._tensors["negative"][row // self._group].long(),
            answer=tuple(answer[answer >= 0].tolist()),
            seconds=float(self._tensors["seconds"][row]),
        )


def select_groups(cache: GradientCache, need: needs.Paths) -> Paths:
    """Select the paths of every group of requests, one group's scores in memory at a time."""
    selected = [
        select_paths(scores.unsqueeze(0), need.paths, need.negatives, need.selection)
        for scores in cache.group_scores(need.score, need.group)
    ]
    return Paths(
        torch.cat([s.positive for s in selected]),
        torch.cat([s.negative for s in selected]),
        torch.cat([s.positive_scores for s in selected]),
    )
