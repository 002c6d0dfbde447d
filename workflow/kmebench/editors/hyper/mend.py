"""MEND (Mitchell et al. 2022, "Fast model editing at scale").

    ΔW = −α Σ_t g̃_t h̃_tᵀ,   (h̃_t, g̃_t) = network(h_t, g_t)

over all tokens t of the texts, with h_t the input of the matrix and g_t the loss gradient at its
output. An untrained network steps down the normalised gradient.
"""

from dataclasses import replace

from torch import Tensor

from kmebench.editors.hyper.base import HyperEditor, every_place
from kmebench.editors.hyper.network import Block, Hypernetwork
from kmebench.editors.rows import Rows
from kmebench.models.encoding import Batch, Encoded


class MENDBlock(Block):
    """z + max(0, s ∘ (P Q z + b) + o)."""

    def forward(self, z: Tensor, module: int) -> Tensor:
        """Return rows z [N, in + out] of a module of this shape, changed."""
        # A clamp passes its gradient at exactly zero, where all begins; a rectifier would not.
        return z + (self.scale[module] * self.mapped(z) + self.shift[module]).clamp(min=0)


class MENDNetwork(Hypernetwork):
    """Changes of rank one, added up."""

    block = MENDBlock

    def factors(self, site: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return u [out, N], v [N, in] of the change ΔW = u v of a site, with their graph."""
        inputs, gradients = self.transformed(site, rows)
        return -self.step_sizes[site] * gradients.T, inputs


class MEND(HyperEditor):
    """The sum of the changes of single requests."""

    network = MENDNetwork

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the texts and positions, [N] each, whose rows the network reads."""
        return every_place(batch)

    def used(self, rows: Rows) -> Rows:
        """Return the rows that make up the gradient: normalised, zeros would count."""
        there = rows.inputs.any(dim=1) & rows.gradients.any(dim=1)
        return Rows(rows.inputs[there], rows.gradients[there])

    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the sum, so that a request's rows are the same in any company."""
        return losses.sum()

    def kept(self, encoded: Encoded) -> Encoded:
        """Return a text as its own target: the model is to stay at all positions."""
        return replace(encoded, n_target=len(encoded.ids) - 1)
