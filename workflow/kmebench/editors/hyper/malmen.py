"""MALMEN (Tan et al. 2024, "Massive editing for large language models via meta learning").

Each answer token t wants another output of a matrix: v_t = −α (h̃_tᵀ h_t) g̃_t, what MEND's change
would do at its input h_t. Ridge regression finds one change that gives all of them what they want:

    ΔW = Vᵀ (H Hᵀ + ρ I)⁻¹ H,   ρ = e^λ learnt
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kmebench.editors.hyper.base import HyperEditor
from kmebench.editors.hyper.cards import HyperHparams
from kmebench.editors.hyper.network import Block, Hypernetwork
from kmebench.editors.rows import Rows
from kmebench.models.encoding import Batch, Encoded
from kmebench.precision import exact


class MALMENBlock(Block):
    """z + s ∘ max(0, P Q z + b) + o."""

    def forward(self, z: Tensor, module: int) -> Tensor:
        """Return rows z [N, in + out] of a module of this shape, changed."""
        return z + self.scale[module] * self.mapped(z).clamp(min=0) + self.shift[module]


class MALMENNetwork(Hypernetwork):
    """One change by normal equations, solved in float64 and in the number of tokens."""

    block = MALMENBlock

    def __init__(self, shapes: Sequence[tuple[int, int]], hparams: HyperHparams) -> None:
        super().__init__(shapes, hparams)
        self.log_ridges = nn.Parameter(torch.zeros(len(shapes)))

    def factors(self, site: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return u [out, N], v [N, in] of the change ΔW = u v of a site, with their graph."""
        inputs, gradients = self.transformed(site, rows)
        along = (rows.inputs.to(inputs) * inputs).sum(dim=1, keepdim=True)
        wanted = -self.step_sizes[site] * along * gradients
        return exact(wanted).T, rows.ridge_solution(exact(self.log_ridges[site]).exp())


class MALMEN(HyperEditor):
    """All requests by one ridge regression."""

    network = MALMENNetwork

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the texts and positions, [N] each, whose rows the network reads."""
        return batch.rows, batch.positions

    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the sum over tokens, so that a token's row is the same in any company."""
        return (losses * batch.counts).sum()

    def kept(self, encoded: Encoded) -> Encoded:
        """Return a text as it is: the model is to stay where it answers."""
        return encoded
