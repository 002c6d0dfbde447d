"""Norm-anchor scaling, NAS (Liu et al. 2026, "NAS", arXiv 2602.02543).

On an edited model, values that are solved grow, they make the weights grow, and those the next
values, until the model collapses. So each value v = v0 + δ, what W2 is to say at the subject, is
scaled to the mean length m that such values have on the unedited model:

    v' = (m / ‖v‖) v;   where ‖v‖ > g m, the edit is given up: v' = v0.

m is measured on development records (:mod:`kmebench.editors.locate.anchor_stage`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kmebench.errors import ConfigError
from kmebench.io.tensors import TensorFile

FORMAT = "kmebench.anchor.v1"
#: Of so many lengths the largest one is dropped: the authors' 5%.
TRIM = 20


@dataclass(frozen=True)
class Anchor:
    """The length of every value, and the limit beyond which an edit is given up."""

    length: float  # m
    guard: float  # g

    @classmethod
    def open(cls, path: str | Path, guard: float) -> "Anchor":
        """Read the lengths of a stage.

        Raises:
            ConfigError: more values diverged than are dropped.
            KMEBenchError: the file is of another kind, or damaged.
        """
        lengths = TensorFile.open(path, FORMAT).tensor("lengths")
        length = trimmed_mean(lengths)
        if math.isnan(length):
            raise ConfigError(
                f"anchor: of {len(lengths)} development requests, whose values NAS measures, "
                f"{int(lengths.isnan().sum())} became NaN or infinite; lower learning_rate."
            )
        return cls(length, guard)

    def scaled(self, deltas: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Return δ' [B, D] with ‖v0 + δ'‖ = m, and which edits are given up, bool [B].

        ``deltas`` is δ, ``said`` is v0, [B, D] both. Of a v that has the length, δ keeps its bits.
        """
        values = said + deltas
        norms = values.norm(dim=1, keepdim=True)
        given_up = norms > self.guard * self.length
        moved = deltas + (self.length / norms - 1) * values
        return moved.masked_fill(given_up, 0.0), given_up[:, 0]


def trimmed_mean(lengths: Tensor) -> float:
    """Return the mean of lengths [N] without the largest N // 20; NaN counts as the largest."""
    kept = len(lengths) - len(lengths) // TRIM
    return float(lengths.double().sort().values[:kept].mean())
