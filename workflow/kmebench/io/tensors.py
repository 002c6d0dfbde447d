"""Safetensors files that say what they are: tensors and a few facts, under the name of a format.

Every tensor's SHA-256 stands in the header and is compared when the tensor is read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kmebench.io.checked_files import set_aside, trusted
from kmebench.io.files import atomic_path
from kmebench.io.headers import read_header


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], form: str, facts: Mapping[str, Any]
) -> None:
    """Write tensors with ``facts`` (JSON) under the name ``form``; the same bytes every time."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: _digest(tensor) for name, tensor in kept.items()}
    # One entry: safetensors writes several in an order that changes from file to file.
    metadata = {form: json.dumps({"facts": facts, "sha256": digests}, sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata=metadata)


@dataclass(frozen=True)
class TensorFile:
    """Read access to a file of :func:`write_tensors`; a tensor is read when it is asked for."""

    path: Path
    facts: Mapping[str, Any]
    digests: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path, form: str) -> "TensorFile":
        """Open a file of format ``form``.

        Raises:
            KMEBenchError: the file is of another format, or damaged.
        """
        header = read_header(path, form)
        return cls(Path(path), header["facts"], header["sha256"])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            DamagedFileError: it is not what was written.
        """
        with trusted(self.path), safe_open(str(self.path), framework="pt") as stream:
            tensor = stream.get_tensor(name)
        if _digest(tensor) != self.digests.get(name):
            raise set_aside(self.path, f"the checksum of {name} differs")
        return tensor


def json_tensor(value: Any) -> Tensor:
    """Return a value as JSON in UTF-8 bytes, uint8, to stand beside tensors in a file."""
    return torch.frombuffer(
        bytearray(json.dumps(value, ensure_ascii=False).encode()), dtype=torch.uint8
    )


def json_value(tensor: Tensor) -> Any:
    """Return the value of a :func:`json_tensor`; tuples come back as lists."""
    return json.loads(tensor.numpy().tobytes())


def _digest(tensor: Tensor) -> str:
    """SHA-256 of the values; numpy lacks bfloat16, so of their bytes."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
