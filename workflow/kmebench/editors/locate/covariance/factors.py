"""What editors read of C, made once for each model and layer: its inverse, or its spectrum.

    (C + ε m I)⁻¹ = (L Lᵀ)⁻¹,   C = V diag(w) Vᵀ,   m the mean eigenvalue

An edit then costs products with [M, M] instead of factorisations, M³ operations each. C is
ill-conditioned, so all is computed and kept in float64, 8 M² bytes for each file.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.needs import Inverse, Spectrum
from kmebench.errors import EditError
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.precision import exact
from kmebench.values import JOIN, read_all

FORMAT = "kmebench.covariance-factor.v1"


class Eigen(NamedTuple):
    """Eigenvalues [M], ascending, and eigenvectors [M, M], one in each row; float64."""

    values: Tensor
    vectors: Tensor

    def to(self, device: torch.device) -> "Eigen":
        """Return the same on a device."""
        return Eigen(self.values.to(device), self.vectors.to(device))


def damped(moment: Tensor, damping: float) -> Tensor:
    """Return Σ + ε m I in float64 of Σ [X, X], or of its diagonal [X]; m is its mean eigenvalue."""
    moment = exact(moment)
    if moment.dim() == 1:
        return moment + damping * moment.mean()
    added = damping * moment.diagonal().mean()
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def inverse_of(covariance: Tensor, damping: float = 0.0) -> Tensor:
    """Return (C + ε m I)⁻¹, [M, M] float64, with ε the ``damping`` and m the mean eigenvalue of C.

    Raises:
        EditError: the sum is not positive definite.
    """
    whole = damped(covariance, damping)
    factor, info = torch.linalg.cholesky_ex(whole)
    if info:
        smallest = float(torch.linalg.eigvalsh(whole)[0])
        raise EditError(
            f"The covariance is singular (smallest eigenvalue {smallest:.2g}): it was made "
            "from too few tokens; raise covariance.tokens."
        )
    return torch.cholesky_inverse(factor).contiguous()  # laid out as it is read


def spectrum_of(covariance: Tensor) -> Eigen:
    """Return eigenvalues and eigenvectors of C; a prefix of them needs no copy."""
    values, vectors = torch.linalg.eigh(exact(covariance))
    return Eigen(values, vectors.T.contiguous())


def damped_inverse(spectrum: Eigen, weight: float, added: float) -> Tensor:
    """Return (λC + α I)⁻¹, [M, M] float64, of the spectrum of C; ``weight`` λ, ``added`` α."""
    scaled = spectrum.vectors / (weight * spectrum.values + added)[:, None]
    return spectrum.vectors.T @ scaled


def cache_factor(
    path: str | Path, covariances: str | Path, factor: str, layer: int, device: str = "cpu"
) -> None:
    """Write the factor of a layer that its need calls ``factor``.

    Computed on the model's GPU, if there is one (mps has no float64).

    Raises:
        EditError: the file of covariances does not hold this layer, or C is singular.
    """
    covariance = Covariances.open(covariances).of(layer).to(_place(device))
    kind, _, settings = factor.partition(JOIN)
    if kind == Spectrum.asset:
        tensors = spectrum_of(covariance)._asdict()
    else:
        tensors = {Inverse.asset: inverse_of(covariance, **read_all(settings))}
    write_tensors(path, tensors, FORMAT, {"layer": layer, "factor": factor})


def _place(device: str) -> str:
    """Return where to compute for a model on ``device``, which a device map may spread."""
    if device.startswith("cuda"):
        return device
    return "cpu" if device in ("cpu", "mps") or not torch.cuda.is_available() else "cuda"


def read_inverse(path: str | Path) -> Tensor:
    """Read C⁻¹ of :func:`cache_factor`.

    Raises:
        KMEBenchError: the file is no such file, or damaged.
    """
    return TensorFile.open(path, FORMAT).tensor(Inverse.asset)


def read_spectrum(path: str | Path) -> Eigen:
    """Read the spectrum of :func:`cache_factor`; raises as :func:`read_inverse`."""
    file = TensorFile.open(path, FORMAT)
    return Eigen(*(file.tensor(name) for name in Eigen._fields))
