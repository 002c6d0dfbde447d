"""Chosen FFN segments that are trained in place, in a model whose weights stay frozen.

The live weights carry the segments as they are by now, so a forward pass costs what it costs in
the unedited model; a backward pass adds the gradient of the chosen segments alone, from the
activations at their projection (:mod:`kmebench.editors.pac.gradients`). Nothing of a weight's size
exists.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.editors.pac.gradients import KEY, VALUE
from kmebench.edits.weights import Columns, Part, Rows, WeightDelta, put_segments
from kmebench.models.editable import EditableModel
from kmebench.precision import at_least_float32


class LiveSegments:
    """Some segments of one parameter: written to the live weight, and put back.

    Segments get slots in the order of :meth:`begin`. Slots 0 to n of ``start`` [capacity, ...]
    hold the masters of the segments ``index`` [n] before the edit, ``before`` their live bits;
    ``slot`` [M] finds a segment's slot, −1 where it has none. Segment 0 stands at ``offset``.
    """

    def __init__(
        self, model: EditableModel, name: str, axis: int, capacity: int, offset: int = 0
    ) -> None:
        self.name, self.axis, self.offset, self._ledger = name, axis, offset, model.edits
        self._weight = model.parameter(name).detach()
        self._live = self._weight.movedim(axis, 0)[offset:]  # shares its memory
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
        residual = self._ledger.residual(self.name, self.axis, new + self.offset)
        self.start[slots] = self._live[new].to(residual) + residual
        return slots

    def write(self, masters: Tensor) -> None:
        """Round ``masters`` [capacity, ...] into the live weight."""
        self._put(masters.to(self._weight.dtype))

    def restore(self) -> None:
        """Put the bits back that were there before."""
        self._put(self.before)

    def _put(self, values: Tensor) -> None:
        places = self.index + self.offset
        put_segments(self._weight, self.axis, places, values[: len(self.index)])

    def part(self, change: Tensor) -> Part:
        """Return ``change`` [capacity, ...] as a part of a delta."""
        kind = Rows if self.axis == 0 else Columns
        return kind.summed(self.index + self.offset, change[: len(self.index)])


class _Chosen(NamedTuple):
    """A parameter, and which of its segments each kind of loss moves (distinct, ascending)."""

    name: str
    axis: int
    offset: int
    by_kind: list[Tensor]


class _Group:
    """What is trained of parameters with segments of one shape, on one device.

    ``lives[p]`` holds the segments of parameter ``p`` that any kind of loss moves, and the part
    ``spans[p]`` of ``start`` [n, ...] their masters before the edit. ``kinds`` says how far each
    kind has moved its own. One tensor for all layers: small operations cost more than their bytes.
    """

    def __init__(self, model: EditableModel, parameters: Sequence[_Chosen]) -> None:
        self.lives = []
        for name, axis, offset, by_kind in parameters:
            index = torch.cat(by_kind).unique()
            self.lives.append(LiveSegments(model, name, axis, len(index), offset))
            self.lives[-1].begin(index)
        self.start = torch.cat([live.start for live in self.lives])
        self.spans = _spans([len(live.index) for live in self.lives])
        for live, span in zip(self.lives, self.spans, strict=True):
            live.start = self.start[span]  # one copy is enough
        by_parameter = (parameter.by_kind for parameter in parameters)
        self.kinds = [_Moved(self, chosen) for chosen in zip(*by_parameter, strict=True)]

    def change(self) -> Tensor:
        """Sum the changes over the kinds of losses, [n, ...]."""
        total = torch.zeros_like(self.start)
        for kind in self.kinds:
            total.index_add_(0, kind.places, kind.change)
        return total

    def write(self) -> None:
        """Bring the live weights up to date."""
        masters = self.start + self.change()
        for live, span in zip(self.lives, self.spans, strict=True):
            live.write(masters[span])

    def parts(self) -> dict[str, Part]:
        """Return the changes by parameter."""
        change = self.change()
        pairs = zip(self.lives, self.spans, strict=True)
        return {live.name: live.part(change[span]) for live, span in pairs}


class _Moved:
    """How far one kind of loss has moved its segments of a group.

    The part ``spans[p]`` of ``change`` [m, ...] belongs to the segments ``chosen[p]`` of parameter
    ``p``; ``places`` [m] finds them in the group. ``change`` has a gradient.
    """

    def __init__(self, group: _Group, chosen: Sequence[Tensor]) -> None:
        self.chosen, self.spans = chosen, _spans([len(index) for index in chosen])
        triples = zip(group.lives, group.spans, chosen, strict=True)
        self.places = torch.cat([live.slot[index] + span.start for live, span, index in triples])
        self.change = torch.zeros_like(group.start[: len(self.places)])
        self.change.grad = torch.zeros_like(self.change)

    def gradient(self, parameter: int) -> Tensor:
        """Return the gradient of one parameter's segments, to add to."""
        return self.change.grad[self.spans[parameter]]


def _spans(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes, initial=0))
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def group_key(weight: Tensor) -> Hashable:
    """What parameters of one group have in common."""
    return weight.device, weight.dim()


class TrainedSegments:
    """The segments that some requests move together, for each of several kinds of loss.

    ``choices`` holds for each kind the segments [R, L, 2, N] on the paths of R requests (keys, then
    values). A segment on several paths counts once; what different kinds do to one adds up.
    """

    def __init__(self, model: EditableModel, choices: Sequence[Tensor]) -> None:
        members: dict[Hashable, list[_Chosen]] = {}

        def join(name: str, axis: int, offset: int, chosen: list[Tensor]) -> tuple[Hashable, int]:
            weight = model.parameter(name)
            group = members.setdefault(group_key(weight), [])
            there = [index.to(weight.device) for index in chosen]
            group.append(_Chosen(name, axis, offset, there))
            return group_key(weight), len(group) - 1

        self._weights: dict[tuple[int, int], tuple[Hashable, int]] = {}  # group, place in it
        self._biases: dict[int, tuple[Hashable, int]] = {}  # of keys, where the family has them
        for layer, ffn in enumerate(model.ffn):
            for matrix, projection in ((KEY, ffn.key), (VALUE, ffn.value)):
                chosen = [kind[:, layer, matrix].unique() for kind in choices]
                offset = projection.offset
                place = join(projection.weight_name, projection.axis, offset, chosen)
                self._weights[layer, matrix] = place
                if matrix == KEY and projection.bias_name is not None:
                    self._biases[layer] = join(projection.bias_name, 0, offset, chosen)
        self._groups = {key: _Group(model, group) for key, group in members.items()}

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, with gradients."""
        return [kind.change for group in self._groups.values() for kind in group.kinds]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Write the segments to the live weights by :meth:`write`; put the bits back at the end."""
        self.write()
        try:
            yield
        finally:
            for live in (live for group in self._groups.values() for live in group.lives):
                live.restore()

    def write(self) -> None:
        """Bring the live weights up to date."""
        for group in self._groups.values():
            group.write()

    def add_gradient(
        self, kind: int, layer: int, matrix: int, residual: Tensor, inner: Tensor
    ) -> None:
        """Add the gradient of one kind of loss, summed over rows and positions.

        ``residual`` [b, T, D] and ``inner`` [b, T, M] are what
        :func:`kmebench.editors.pac.gradients.observed` gives.
        """
        group, place = self._weights[layer, matrix]
        moved = self._groups[group].kinds[kind]
        inner = at_least_float32(inner.flatten(0, 1).index_select(1, moved.chosen[place]))
        residual = at_least_float32(residual.flatten(0, 1))
        moved.gradient(place).addmm_(inner.T, residual)
        if matrix == KEY and layer in self._biases:
            group, place = self._biases[layer]
            self._groups[group].kinds[kind].gradient(place).add_(inner.sum(dim=0))

    def delta(self) -> WeightDelta:
        """Return what the segments have become as a delta of the model's weights."""
        parts = [group.parts() for group in self._groups.values()]
        return WeightDelta({name: part for each in parts for name, part in each.items()})
