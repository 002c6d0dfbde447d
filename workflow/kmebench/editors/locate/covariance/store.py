"""The file of the covariance: C = E[k kᵀ] of W2's input, one [M, M] float32 per layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kmebench.editors.needs import Covariance
from kmebench.errors import EditError
from kmebench.io.tensors import TensorFile, write_tensors


@dataclass(frozen=True)
class Covariances:
    """Read access to a file of covariances; a layer is read when it is asked for."""

    file: TensorFile
    tokens: int
    layers: tuple[int, ...]
    text: Mapping[str, Any]  # where the text came from

    @classmethod
    def open(cls, path: str | Path) -> "Covariances":
        """Open a file of :func:`write_covariance`.

        Raises:
            KMEBenchError: the file is no such file, or damaged.
        """
        file = TensorFile.open(path, Covariance.form)
        return cls(file, file.facts["tokens"], tuple(file.facts["layers"]), file.facts["text"])

    def of(self, layer: int) -> Tensor:
        """Return C of one layer, [M, M] float32, on the CPU.

        Raises:
            EditError: the file does not hold this layer.
            DamagedFileError: the file was changed since.
        """
        if layer not in self.layers:
            raise EditError(
                f"{self.file.path} holds no covariance of layer {layer}, only of "
                f"{', '.join(map(str, self.layers))}; edit one of these, or make the file again "
                f"with layer {layer} among its layers."
            )
        return self.file.tensor(str(layer))


def check_covariance(path: str | Path) -> None:
    """Refuse a file of the user's that holds no covariance; it stays as it is.

    Raises:
        EditError: so it is.
    """
    try:
        with safe_open(str(path), framework="pt") as stream:
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} cannot be read as a file of covariances: {error}.") from error
    if Covariance.form not in metadata:
        raise EditError(f"{path} is no file of covariances, as the workflow makes for a model.")


def write_covariance(
    path: str | Path, covariance: Mapping[int, Tensor], tokens: int, text: Mapping[str, Any]
) -> None:
    """Write C by layer, with the number of tokens and the source of the text."""
    facts = {"tokens": tokens, "layers": sorted(covariance), "text": dict(text)}
    tensors = {str(layer): matrix for layer, matrix in covariance.items()}
    write_tensors(path, tensors, Covariance.form, facts)
