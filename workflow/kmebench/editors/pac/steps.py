"""Steps of natural PAC: along natural gradients, or by Adam for comparison."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kmebench.editors.changes import low_rank
from kmebench.editors.pac.cards import NPACHparams
from kmebench.editors.pac.gradients import KEY
from kmebench.editors.pac.metric import Positions, Solve, natural, polyak, text_gram, together
from kmebench.edits.weights import Columns, Rows, WeightDelta
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import Projection
from kmebench.precision import promoted

#: Layer, and KEY or VALUE.
Matrix = tuple[int, int]


class Chosen(NamedTuple):
    """The segments of a matrix that an edit moves (none: all), and how it divides by the metric."""

    segments: Tensor | None
    divide_residual: Solve
    divide_inner: Solve


class Step(NamedTuple):
    """A change of the model, and what it costs by the metric, in nats per neutral token."""

    change: WeightDelta
    cost: float


class Steps(Protocol):
    """How an edit moves the segments it has chosen."""

    def __call__(
        self, gradients: Mapping[Matrix, Positions], losses: Tensor, each: int, nats: float
    ) -> Step:
        """Return one step, of at most ``nats`` for each request that learns.

        ``gradients`` are those of texts that learn, and ``losses`` those of all texts, ``each`` of
        a request.
        """


class NaturalSteps:
    """Down the loss at the least cost by the metric."""

    def __init__(
        self,
        name: str,
        model: EditableModel,
        chosen: Mapping[Matrix, Chosen],
        hparams: NPACHparams,
    ) -> None:
        self._name, self._model, self._chosen, self._hparams = name, model, chosen, hparams

    def __call__(
        self, gradients: Mapping[Matrix, Positions], losses: Tensor, each: int, nats: float
    ) -> Step:
        """Step; see :class:`Steps`.

        Raises:
            EditError: no gradient reaches the layers: no later token reads the last one.
        """
        directions = {key: natural(gradients[key], *chosen) for key, chosen in self._chosen.items()}
        owner = gradients[next(iter(directions))].owner.cpu()
        texts, owner = owner.unique(return_inverse=True)
        gram = text_gram(list(directions.values()), owner, len(texts))
        if not gram.any():
            raise EditError(
                f"{self._name}: the loss does not depend on layers {list(self._hparams.layers)} at "
                "the positions that write; take earlier layers, or set positions: from_subject."
            )
        learning = len(texts) / each
        weights = self._weights(gram, losses[texts], nats * learning)
        change = WeightDelta({})
        for key, direction in directions.items():
            scale = -weights[owner].to(direction.residual)[:, None]
            index = self._chosen[key].segments
            u, v = scale * direction.residual, direction.inner
            change += _outer_change(projection_of(self._model, key), index, u, v)
        return Step(change, float(weights @ gram @ weights) / 2 / learning)

    def _weights(self, gram: Tensor, losses: Tensor, nats: float) -> Tensor:
        if self._hparams.step == "longest":
            return polyak(gram, torch.full_like(losses, torch.inf), nats)
        fall = losses * self._hparams.relaxation
        if self._hparams.step == "each":
            return together(gram, fall, nats, self._hparams.step_damping)
        return polyak(gram, fall, nats)


class AdamSteps:
    """Adam on the losses of all texts, as PAC steps: the metric chooses segments and no more.

    Losses are summed: the scale of a gradient does not matter to Adam.
    """

    def __init__(
        self, model: EditableModel, chosen: Mapping[Matrix, Chosen], learning_rate: float
    ) -> None:
        self._model, self._chosen = model, chosen
        self._learning_rate = learning_rate
        self._moved: dict[Matrix, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    def __call__(
        self, gradients: Mapping[Matrix, Positions], losses: Tensor, each: int, nats: float
    ) -> Step:
        """Step; see :class:`Steps`. The metric has no say in its length: it costs nothing."""
        slopes = {}
        for key, chosen in self._chosen.items():
            residual, inner, _ = gradients[key]
            inner = inner if chosen.segments is None else inner[:, chosen.segments]
            slopes[key] = (inner.T @ residual).to(promoted(residual.dtype))
        if self._adam is None:
            self._moved = {key: torch.zeros_like(slope) for key, slope in slopes.items()}
            self._adam = torch.optim.Adam(self._moved.values(), lr=self._learning_rate)
        before = {key: moved.clone() for key, moved in self._moved.items()}
        for key, slope in slopes.items():
            self._moved[key].grad = slope
        self._adam.step()
        change = WeightDelta({})
        for key, moved in self._moved.items():
            index, values = self._chosen[key].segments, moved - before[key]
            change += _segment_change(projection_of(self._model, key), index, values)
        return Step(change, 0.0)


def projection_of(model: EditableModel, key: Matrix) -> Projection:
    """Return W1 or W2 of a layer."""
    ffn = model.ffn[key[0]]
    return ffn.key if key[1] == KEY else ffn.value


def _outer_change(
    projection: Projection, index: Tensor | None, u: Tensor, v: Tensor
) -> WeightDelta:
    """Return Σ_p u_p ⊗ v_p over segments, u [P, D] and v [P, S], as a change of the weight."""
    if index is None:
        return low_rank(projection, (u.T, v))
    return _segment_change(projection, index, (v.T @ u).to(promoted(projection.weight.dtype)))


def _segment_change(projection: Projection, index: Tensor | None, values: Tensor) -> WeightDelta:
    """Return what is added to segments, [S, D], as a change of the weight."""
    kind = Rows if projection.axis == 0 else Columns
    places = torch.arange(len(values)) if index is None else index
    part = kind((places + projection.offset).to(values.device), values)
    return WeightDelta({projection.weight_name: part})
