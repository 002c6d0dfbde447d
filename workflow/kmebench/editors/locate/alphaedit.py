"""AlphaEdit (Fang et al. 2025, "AlphaEdit: null-space constrained knowledge editing").

MEMIT, whose changes leave alone what preserved keys use: Δ vanishes on the eigenvectors of C with
eigenvalues at or above a threshold. What earlier edits wrote at their keys, the editor's memory
along consecutive edits, is kept as well.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kmebench.editors.base import Assets
from kmebench.editors.locate.base import by_layer
from kmebench.editors.locate.cards import AlphaEditHparams
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import Factors, KeptKeys, alphaedit_update
from kmebench.errors import EditError
from kmebench.io.logs import announce
from kmebench.models.editable import EditableModel
from kmebench.precision import exact_place

logger = logging.getLogger("kmebench")

#: Shares of free directions below which next to nothing may be changed, and above which next to
#: nothing is protected. The default threshold is made for covariances of GPT-J and Llama.
FEW, ALMOST_ALL = 0.01, 0.999


class AlphaEdit(MEMIT):
    """Changes in the null space of preserved keys."""

    hparams: AlphaEditHparams
    _earlier: dict[int, Tensor]  # layer -> keys of earlier edits, [M, E]
    _calls: dict[int, Tensor]  # layer -> how many of them each call brought
    _kept: dict[int, KeptKeys]  # layer -> what an update reads of them; made of them when missing

    def __init__(self, hparams: AlphaEditHparams, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._bases: dict[int, Tensor] = {}  # layer -> [M, n]

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        earlier = self._earlier.get(layer, keys[:, :0])
        self._earlier[layer] = earlier.to(keys)  # a state may lie elsewhere
        self._calls.setdefault(layer, torch.zeros(0, dtype=torch.long))
        basis, ridge = self._basis(model, layer), self.hparams.ridge
        if layer not in self._kept:
            self._kept[layer] = KeptKeys.none(basis)
            for part in self._parts(layer):
                self._kept[layer] = self._kept[layer].appended(part, basis, ridge)
        self._kept[layer] = self._kept[layer].appended(keys, basis, ridge)
        self._earlier[layer] = torch.cat([self._earlier[layer], keys], dim=1)
        self._calls[layer] = torch.cat([self._calls[layer], torch.tensor(keys.shape[1:])])
        return alphaedit_update(residual, basis, self._kept[layer])

    def _parts(self, layer: int) -> Sequence[Tensor]:
        """Return the keys of earlier edits as calls brought them, so that sums have their bits."""
        return self._earlier[layer].split(self._calls[layer].tolist(), dim=1)

    def _basis(self, model: EditableModel, layer: int) -> Tensor:
        if layer not in self._bases:
            spectrum = self.spectrum(model, layer)
            where = f"{self.name}: layer {layer}"
            free = count_free(spectrum.values, self.hparams.threshold, where)
            place = exact_place(model.ffn[layer].value.weight.device)
            self._bases[layer] = spectrum.vectors[:free].T.to(place)
        return self._bases[layer]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contexts, the keys of earlier edits, and how many each call brought."""
        keys = {f"keys.{layer}": keys for layer, keys in self._earlier.items()}
        calls = {f"calls.{layer}": calls for layer, calls in self._calls.items()}
        return super().state_dict() | keys | calls

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore contexts and keys; an empty state forgets them."""
        super().load_state_dict(state)
        self._earlier, self._calls = by_layer(state, "keys."), by_layer(state, "calls.")
        self._kept = {}


def count_free(values: Tensor, threshold: float, where: str) -> int:
    """Return how many of the eigenvalues [M] of C, ascending, are below the threshold.

    Raises:
        EditError: none is.
    """
    free, width = int((values < threshold).sum()), len(values)
    among = f"the eigenvalues of the covariance, {values[0]:.2g} to {values[-1]:.2g}"
    if not free:
        raise EditError(
            f"none of {among}, is below {threshold:g}, so nothing may be changed; raise threshold."
        )
    told = f"{where}: {free} of {width} directions free"
    if FEW * width <= free <= ALMOST_ALL * width:
        logger.info(told)
        return free
    meaning = "protected; lower" if free > FEW * width else "changed; raise"
    announce(
        f"{told}, where {among}, are below {threshold:g}: next to nothing is {meaning} threshold.",
        logging.WARNING,
    )
    return free
