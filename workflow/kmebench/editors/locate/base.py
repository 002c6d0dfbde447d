"""What the locate-and-edit editors share: contexts, what they read of C and of NAS."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Assets
from kmebench.editors.contexts import InContexts
from kmebench.editors.locate.anchor import Anchor
from kmebench.editors.locate.covariance.factors import (
    Eigen,
    inverse_of,
    read_inverse,
    read_spectrum,
    spectrum_of,
)
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.updates import DependentKeysError
from kmebench.editors.needs import Covariance, Inverse, Spectrum, Trained
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.precision import exact_place


class LocateAndEdit(InContexts):
    """An editor of W2 of few layers."""

    def __init__(self, hparams: Any, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._inverses: dict[int, Tensor] = {}

    @cached_property
    def anchor(self) -> Anchor | None:
        """The length of every value, of the cached stage; None without NAS."""
        if self.hparams.anchor is None:
            return None
        return Anchor.open(self.assets[Trained.asset], self.hparams.anchor_guard)

    def inverse(self, model: EditableModel, layer: int) -> Tensor:
        """Return C⁻¹ of a layer, [M, M] float64: of the cached stage, or made of C, once."""
        if layer not in self._inverses:
            cached = self.assets.get(Inverse(layer).key)
            made = read_inverse(cached) if cached else inverse_of(self.covariance(model, layer))
            self._inverses[layer] = made.to(exact_place(model.ffn[layer].value.weight.device))
        return self._inverses[layer]

    def spectrum(self, model: EditableModel, layer: int) -> Eigen:
        """Return the eigenvalues and eigenvectors of C: of the cached stage, or computed."""
        cached = self.assets.get(Spectrum(layer).key)
        return read_spectrum(cached) if cached else spectrum_of(self.covariance(model, layer))

    def covariance(self, model: EditableModel, layer: int) -> Tensor:
        """Return C of a layer, [M, M] float32, on the device of the layer."""
        covariance = Covariances.open(self.assets[Covariance.asset]).of(layer)
        return covariance.to(model.ffn[layer].value.weight.device)


@contextmanager
def naming(editor: str, layer: int, requests: Sequence[EditRequest]) -> Iterator[None]:
    """Say in an :class:`EditError` of the block which editor, layer and requests it is about."""
    try:
        yield
    except DependentKeysError as error:
        first, second = (requests[place].case_id for place in error.pair)
        where = f"{editor}: layer {layer}, requests {first!r} and {second!r}"
        raise EditError(f"{where}: {error}") from error
    except EditError as error:
        last = f" to {requests[-1].case_id!r}" if len(requests) > 1 else ""
        where = f"{editor}: layer {layer}, request {requests[0].case_id!r}{last}"
        raise EditError(f"{where}: {error}") from error


def by_layer(state: Mapping[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """Return the tensors of a state whose names are a prefix and a layer."""
    found = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
    return {int(layer): tensor for layer, tensor in found.items()}
