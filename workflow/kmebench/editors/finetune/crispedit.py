"""CrispEdit: fine-tuning in directions of low curvature (Ikram et al. 2026, arXiv 2602.15823).

LocFT-BF on W2 of some layers, where what the model says of neutral text may hardly change. With
the K-FAC factors A = E[k kᵀ] of W2's input and F = E[g gᵀ] of the loss gradient at its output,

    A = U_A diag(a) U_Aᵀ,   F = U_F diag(f) U_Fᵀ,   G ← U_F (K ∘ (U_Fᵀ G U_A)) U_Aᵀ

a gradient G keeps the coordinates (i, j) whose curvature f_i a_j is low: K_ij = 1 below the
threshold at which the largest curvatures sum to the share γ of all, else 0.

As published, Adam then divides by element, which leads out of these directions again. With
``project: update`` it works on the coordinates themselves, so the change never leaves them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kmebench.editors.base import Assets, check_layers
from kmebench.editors.finetune.cards import CrispEditHparams
from kmebench.editors.finetune.training import FineTuning, Trained
from kmebench.editors.locate.covariance.factors import read_spectrum, spectrum_of
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.needs import Covariance, NeutralMetric, Spectrum
from kmebench.editors.pac.neutral import read_metric
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import Projection
from kmebench.precision import at_least_float32, exact_place

logger = logging.getLogger("kmebench")


@dataclass(frozen=True)
class Subspace:
    """Low-curvature directions of a weight [r, c]."""

    left: Tensor  # [r, r], eigenvectors in rows
    right: Tensor  # [c, c], likewise
    kept: Tensor  # [r, c] bool

    def coordinates(self, gradient: Tensor) -> Tensor:
        """Return the coordinates [r, c] of a gradient [r, c]; zero where curvature is high."""
        return (self.left @ gradient @ self.right.T).where(self.kept, 0.0)

    def weights(self, coordinates: Tensor) -> Tensor:
        """Return the change [r, c] of a weight that has these coordinates."""
        return self.left.T @ coordinates @ self.right


def low_curvature(left: Tensor, right: Tensor, share: float) -> Tensor:
    """Return which of the curvatures l_i r_j are kept, bool [r, c], given l [r] and r [c].

    The largest of all, as few as sum to ``share`` of the total, are left out, and so are equals
    of the smallest of them. Rounding makes zero eigenvalues negative; they count as zero.
    """
    curvature = torch.outer(left.clamp(min=0), right.clamp(min=0))
    ranked = curvature.flatten().sort(descending=True).values
    cumulated = ranked.cumsum(dim=0)
    last = int((cumulated < share * cumulated[-1]).sum())
    return curvature < ranked[last]


class CrispEdit(FineTuning):
    """Fine-tuning of W2 of some layers where curvature is low."""

    hparams: CrispEditHparams

    def __init__(self, hparams: CrispEditHparams, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self._subspaces: dict[str, Subspace] = {}  # by parameter name

    def trained(self, model: EditableModel) -> dict[str, Trained]:
        """Return W2 of the layers, whose subspaces are computed once.

        Raises:
            EditError: in a layer nothing may be changed.
        """
        layers = self.hparams.layers
        check_layers(self.name, layers, model)
        values = {layer: model.ffn[layer].value for layer in layers}
        with self.stopwatch("trace"):
            for layer, value in values.items() if self.hparams.gamma else ():
                if value.weight_name not in self._subspaces:
                    self._subspaces[value.weight_name] = self._subspace(layer, value)
        return Trained.by_name(list(values.values()))

    def _subspace(self, layer: int, value: Projection) -> Subspace:
        """Return the low-curvature directions of W2 of a layer, from the cached stages."""
        place, gamma = exact_place(value.weight.device), self.hparams.gamma
        cached = self.assets.get(Spectrum(layer).key)
        if cached:
            inputs = read_spectrum(cached).to(place)
        else:
            inputs = spectrum_of(
                Covariances.open(self.assets[Covariance.asset]).of(layer).to(place)
            )
        outputs = spectrum_of(
            read_metric(self.assets[NeutralMetric.asset], layer).outputs.to(place)
        )
        left, right = (outputs, inputs) if value.axis == 1 else (inputs, outputs)  # as stored
        kept = low_curvature(left.values, right.values, gamma)
        if not kept.any():
            raise EditError(
                f"{self.name}: in layer {layer} no direction has a curvature below the "
                f"threshold, so nothing may be changed; lower gamma (now {gamma})."
            )
        logger.info(
            f"{self.name}: layer {layer}: {int(kept.sum())} of {kept.numel()} directions free"
        )
        like = at_least_float32(value.weight)
        return Subspace(left.vectors.to(like), right.vectors.to(like), kept.to(like.device))

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        trained: Mapping[str, Trained],
        masters: dict[str, Tensor],
        centers: dict[str, Tensor],
    ) -> None:
        """Move the masters in their subspaces; see the head of this module."""
        rotated = self.hparams.project == "update" and bool(self._subspaces)
        for name, space in self._subspaces.items():
            gradient = trained[name].parameter.grad
            coordinates = space.coordinates(gradient.to(masters[name]))
            gradient.copy_(coordinates if rotated else space.weights(coordinates))
        if not rotated:
            super()._step(optimiser, trained, masters, centers)
            return
        # For the time of Adam's step, the masters are what their coordinates change by.
        before = {name: master.clone() for name, master in masters.items()}
        for master in masters.values():
            master.zero_()
        super()._step(optimiser, trained, masters, centers)
        for name, space in self._subspaces.items():
            masters[name].copy_(before[name] + space.weights(masters[name]))
            trained[name].parameter.detach().copy_(masters[name])
