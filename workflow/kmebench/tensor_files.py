"""Safetensors files that say what they are: tensors and a few facts, under the name of a format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kmebench.errors import KMEBenchError
from kmebench.files import atomic_path


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], form: str, facts: Mapping[str, Any]
) -> None:
    """Write tensors with ``facts`` (JSON) under the name ``form``; the same bytes every time."""
    # One entry: safetensors writes several in an order that changes from file to file.
    metadata = {form: json.dumps(facts, sort_keys=True)}
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata=metadata)


def read_facts(path: str | Path, form: str) -> dict[str, Any]:
    """Read the facts of a file of :func:`write_tensors`.

    Raises:
        KMEBenchError: the file is of another format.
    """
    with safe_open(str(path), framework="pt") as stream:
        metadata = stream.metadata() or {}
    if form not in metadata:
        raise KMEBenchError(
            f"{path} is not a file of format {form}; delete it and run the workflow again."
        )
    return json.loads(metadata[form])
