"""What the locate-and-edit editors share: contexts, what they read of C, changes of W2."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Assets
from kmebench.editors.contexts import InContexts
from kmebench.editors.locate.covariance.factors import inverse_of, read_inverse
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.updates import DependentKeysError, Factors
from kmebench.editors.needs import Covariance, Inverse
from kmebench.edits.weights import LowRank, WeightDelta
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import Projection
from kmebench.precision import exact_place, promoted


class LocateAndEdit(InContexts):
    """An editor of W2 of few layers."""

    def __init__(self, hparams: Any, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._inverses: dict[int, Tensor] = {}

    def inverse(self, model: EditableModel, layer: int) -> Tensor:
        """Return C⁻¹ of a layer, [M, M] float64: of the cached stage, or made of C, once."""
        if layer not in self._inverses:
            cached = self.assets.get(Inverse(layer).key)
            made = read_inverse(cached) if cached else inverse_of(self.covariance(model, layer))
            self._inverses[layer] = made.to(exact_place(model.ffn[layer].value.weight.device))
        return self._inverses[layer]

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


def low_rank(projection: Projection, factors: Factors) -> WeightDelta:
    """Return factors of Δ [D, M] as a change of W2's weight, however it is stored."""
    dtype, device = promoted(projection.weight.dtype), projection.weight.device
    u, v = (factor.to(dtype).to(device) for factor in factors)  # a device may lack float64
    part = LowRank(u, v) if projection.axis == 1 else LowRank(v.T, u.T)
    return WeightDelta({projection.weight_name: part})
