"""AlphaEdit (Fang et al. 2025, "AlphaEdit: null-space constrained knowledge editing").

MEMIT, whose changes leave alone what preserved keys use: Δ vanishes on the eigenvectors of C with
eigenvalues at or above a threshold. What earlier edits wrote at their keys, the editor's memory
along consecutive edits, is kept as well.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from kmebench.editors.base import Assets
from kmebench.editors.locate.cards import AlphaEditHparams
from kmebench.editors.locate.covariance.factors import read_spectrum, spectrum_of
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import Factors, alphaedit_update
from kmebench.editors.needs import Spectrum
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.precision import exact_place

logger = logging.getLogger("kmebench")


class AlphaEdit(MEMIT):
    """Changes in the null space of preserved keys."""

    hparams: AlphaEditHparams
    _earlier: dict[int, Tensor]  # layer -> keys of earlier edits, [M, E]

    def __init__(self, hparams: AlphaEditHparams, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._bases: dict[int, Tensor] = {}  # layer -> [M, n]

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        earlier = self._earlier.get(layer, keys[:, :0]).to(keys)
        basis = self._basis(model, layer)
        update = alphaedit_update(residual, keys, earlier, basis, self.hparams.ridge)
        self._earlier[layer] = torch.cat([earlier, keys], dim=1)
        return update

    def _basis(self, model: EditableModel, layer: int) -> Tensor:
        if layer not in self._bases:
            cached = self.assets.get(Spectrum(layer).key)
            spectrum = (
                read_spectrum(cached) if cached else spectrum_of(self.covariance(model, layer))
            )
            unused = int((spectrum.values < self.hparams.threshold).sum())
            if not unused:
                raise EditError(
                    f"no eigenvalue of the covariance is below {self.hparams.threshold:g}, so "
                    "nothing may be changed; raise threshold."
                )
            width = len(spectrum.values)
            logger.info("%s: layer %d: %d of %d directions free", self.name, layer, unused, width)
            place = exact_place(model.ffn[layer].value.weight.device)
            self._bases[layer] = spectrum.vectors[:unused].T.to(place)
        return self._bases[layer]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contexts and the keys of earlier edits."""
        keys = {f"keys.{layer}": keys for layer, keys in self._earlier.items()}
        return super().state_dict() | keys

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore contexts and keys; an empty state forgets them."""
        super().load_state_dict(state)
        self._earlier = {
            int(name.removeprefix("keys.")): keys
            for name, keys in state.items()
            if name.startswith("keys.")
        }
