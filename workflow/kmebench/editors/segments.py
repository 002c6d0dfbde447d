"""Chosen FFN segments that are trained in place, in a model whose weights stay frozen.

The live weights carry the segments as they are by now, so a forward pass costs what it costs in
the unedited model; a backward pass adds the gradient of the chosen segments alone, from the
activations at their projection (:func:`kmebench.tracing.observe.observed`). Nothing of a weight's
size exists.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kmebench.models.editable import EditableModel
from kmebench.tracing.observe import KEY, VALUE, at_least_float32
from kmebench.weights.delta import Columns, Part, Rows, WeightDelta


class LiveSegments:
    """Some segments of one parameter: written to the live weight, and put back.

    Segments get slots in the order of :meth:`begin`. Slots 0 to n of ``start`` [capacity, ...]
    hold the masters of the segments ``index`` [n] before the edit, ``before`` their live bits;
    ``slot`` [M] finds a segment's slot, −1 where it has none.
    """

    def __init__(self, model: EditableModel, name: str, axis: int, capacity: int) -> None:
        self.name, self.axis, self._ledger = name, axis, model.edits
        self._live = model.parameter(name).detach().movedim(axis, 0)  # shares its memory
        self.slot = torch.full((len(self._live),), -1, device=self._live.device)
        self.index = self.slot[:0]
        self.before = self._live.new_zeros(capacity, *self._live.shape[1:])
        self.start = at_least_float32(self.before).clone()

    def begin(self, index: Tensor) -> Tensor:
        """Give slots to those distinct segments that have none yet; return these slots."""
        new = index[self.slot[index] < 0]
        slots = torch.arange(len(new), device=new.device) + len(self.index)
        self.slot[new] = slots
        self.index = torch.cat([self.index, new])
        self.before[slots] = self._live[new]
        residual = self._ledger.residual(self.name, self.axis, new)
        self.start[slots] = self._live[new].to(residual) + residual
        return slots

    def write(self, masters: Tensor) -> None:
        """Round ``masters`` [capacity, ...] into the live weight."""
        self._live[self.index] = masters[: len(self.index)].to(self._live)

    def restore(self) -> None:
        """Put the bits back that were there before."""
        self._live[self.index] = self.before[: len(self.index)]

    def part(self, change: Tensor) -> Part:
        """Return ``change`` [capacity, ...] as a part of a delta."""
        kind = Rows if self.axis == 0 else Columns
        return kind.summed(self.index, change[: len(self.index)])


class _Moved:
    """What one kind of loss moves of one parameter: the changes of each request's segments.

    ``slots`` [R, N] finds the N segments of each of R requests among ``change`` [n, ...], which
    has a gradient of its shape; requests share the segments that several have chosen.
    """

    def __init__(self, chosen: Tensor, live: LiveSegments) -> None:
        self.chosen = chosen
        self.index, self.slots = chosen.unique(return_inverse=True)
        # Of a segment that a request names twice (paths may share nodes) the first one counts.
        twice = (chosen.unsqueeze(2) == chosen.unsqueeze(1)).tril(-1).any(dim=2)
        self.counts = (~twice).to(live.start.dtype)  # [R, N] 1 or 0
        self.change = torch.zeros_like(live.start[: len(self.index)])
        self.change.grad = torch.zeros_like(self.change)

    def add_gradient(self, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradients [b, N, ...] of the requests ``rows`` [b] for their segments."""
        shape = (-1, *self.change.shape[1:])
        counts = self.counts[rows].reshape(*gradient.shape[:2], *[1] * (gradient.dim() - 2))
        slots = self.slots[rows].flatten()
        self.change.grad.index_add_(0, slots, (gradient * counts).reshape(shape))

    def still(self, rows: Tensor) -> Tensor:
        """Return the slots that none of the requests ``rows`` owns."""
        owned = torch.zeros(len(self.index), dtype=torch.bool, device=self.slots.device)
        owned[self.slots[rows].flatten()] = True
        return (~owned).nonzero().squeeze(1)


class _Parameter:
    """One trained parameter: its live segments, and what each kind of loss moves of them."""

    def __init__(
        self, model: EditableModel, name: str, axis: int, choices: Sequence[Tensor]
    ) -> None:
        device = model.parameter(name).device
        choices = [chosen.to(device) for chosen in choices]
        index = torch.cat([chosen.flatten() for chosen in choices]).unique()
        self.live = LiveSegments(model, name, axis, len(index))
        self.live.begin(index)
        self.kinds = [_Moved(chosen, self.live) for chosen in choices]

    def change(self) -> Tensor:
        """Sum the changes over the kinds of losses, [n, ...]."""
        total = torch.zeros_like(self.live.start)
        for kind in self.kinds:
            total.index_add_(0, self.live.slot[kind.index], kind.change)
        return total

    def write(self) -> None:
        """Bring the live weight up to date."""
        self.live.write(self.live.start + self.change())


class TrainedSegments:
    """The segments that R requests move along their paths, for each of several kinds of loss.

    ``choices`` holds for each kind the segments [R, L, 2, N] (keys, then values). Requests
    share a segment that several have chosen for one kind; what different kinds do to a segment
    adds up.
    """

    def __init__(self, model: EditableModel, choices: Sequence[Tensor]) -> None:
        self._weights: dict[tuple[int, int], _Parameter] = {}
        self._biases: dict[int, _Parameter] = {}  # of keys, where the family has them
        for layer, ffn in enumerate(model.ffn):
            for matrix, projection in ((KEY, ffn.key), (VALUE, ffn.value)):
                chosen = [kind[:, layer, matrix] for kind in choices]
                name, axis = projection.weight_name, projection.axis
                self._weights[layer, matrix] = _Parameter(model, name, axis, chosen)
                if matrix == KEY and projection.bias_name is not None:
                    self._biases[layer] = _Parameter(model, projection.bias_name, 0, chosen)

    @property
    def _parameters(self) -> list[_Parameter]:
        return [*self._weights.values(), *self._biases.values()]

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, with gradients."""
        return [kind.change for parameter in self._parameters for kind in parameter.kinds]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Write the segments to the live weights by :meth:`write`; put the bits back at the end."""
        self.write()
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.live.restore()

    def write(self) -> None:
        """Bring the live weights up to date."""
        for parameter in self._parameters:
            parameter.write()

    def add_gradient(
        self, kind: int, rows: Tensor, layer: int, matrix: int, residual: Tensor, inner: Tensor
    ) -> None:
        """Add the gradient of one kind of loss of the requests ``rows`` [b].

        ``residual`` [b, T, D] and ``inner`` [b, T, M] are what
        :func:`kmebench.tracing.observe.observed` gives.
        """
        moved = self._weights[layer, matrix].kinds[kind]
        rows = rows.to(inner.device)
        index = moved.chosen[rows].unsqueeze(1).expand(-1, inner.shape[1], -1)
        inner, residual = at_least_float32(inner.gather(2, index)), at_least_float32(residual)
        moved.add_gradient(rows, inner.transpose(1, 2) @ residual)
        if matrix == KEY and layer in self._biases:
            self._biases[layer].kinds[kind].add_gradient(rows, inner.sum(dim=1))

    @contextmanager
    def moving(self, rows: Tensor) -> Iterator[None]:
        """Leave the segments that none of ``rows`` owns as they are, whatever the block does."""
        kinds = [kind for parameter in self._parameters for kind in parameter.kinds]
        stills = [kind.still(rows.to(kind.slots.device)) for kind in kinds]
        values = [kind.change[still] for kind, still in zip(kinds, stills, strict=True)]
        yield
        for kind, still, value in zip(kinds, stills, values, strict=True):
            kind.change[still] = value

    def delta(self) -> WeightDelta:
        """Return what the segments have become as a delta of the model's weights."""
        return WeightDelta({p.live.name: p.live.part(p.change()) for p in self._parameters})
