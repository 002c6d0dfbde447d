"""What the header of a safetensors file of ours says. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kmebench.errors import KMEBenchError
from kmebench.io.checked_files import trusted


def read_header(path: str | Path, form: str) -> Any:
    """Return what is written, as JSON, under ``form`` in the header of a safetensors file.

    Raises:
        KMEBenchError: nothing is, or the file is damaged.
    """
    with trusted(path), safe_open(str(path), framework="np") as stream:
        metadata = stream.metadata() or {}
    if form not in metadata:
        raise KMEBenchError(
            f"{path} is not a file of format {form}; delete it and run the workflow again."
        )
    with trusted(path):
        return json.loads(metadata[form])
