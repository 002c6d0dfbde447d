"""Chosen FFN segments that are trained in place, in a model whose weights stay frozen.

The live weights carry the segments as they are by now, so a forward pass costs what it costs in
the unedited model; a backward pass adds the gradient of the chosen segments alone, from the
activations at their projection (:func:`kmebench.tracing.observe.observed`). Nothing of a weight's
size exists.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
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


class _Group:
    """What is trained of parameters with segments of one shape: all weights, or all key biases.

    ``lives[p]`` holds the segments of parameter ``p`` that any kind of loss moves, and the part
    ``spans[p]`` of ``start`` [n, ...] their masters before the edit. ``kinds`` says how far each
    kind has moved its own. One tensor for all layers: small operations cost more than their bytes.
    """

    def __init__(
        self,
        model: EditableModel,
        parameters: Mapping[tuple[str, int], Sequence[Tensor]],
    ) -> None:
        self.lives = []
        for (name, axis), chosen in parameters.items():
            index = torch.cat(list(chosen)).unique()
            live = LiveSegments(model, name, axis, len(index))
            live.begin(index)
            self.lives.append(live)
        self.start = torch.cat([live.start for live in self.lives])
        self.spans = _spans([len(live.index) for live in self.lives])
        for live, span in zip(self.lives, self.spans, strict=True):
            live.start = self.start[span]  # one copy is enough
        of_kinds = zip(*parameters.values(), strict=True)
        self.kinds = [_Moved(self, [index.unique() for index in chosen]) for chosen in of_kinds]

    def masters(self) -> Tensor:
        """Return the segments as they are by now, [n, ...]."""
        masters = self.start.clone()
        for kind in self.kinds:
            masters.index_add_(0, kind.places, kind.change)
        return masters

    def write(self) -> None:
        """Bring the live weights up to date."""
        masters = self.masters()
        for live, span in zip(self.lives, self.spans, strict=True):
            live.write(masters[span])

    def parts(self) -> dict[str, Part]:
        """Return the changes by parameter."""
        change = self.masters() - self.start
        pairs = zip(self.lives, self.spans, strict=True)
        return {live.name: live.part(change[span]) for live, span in pairs}


class _Moved:
    """How far one kind of loss has moved its segments of a group.

    The part ``spans[p]`` of ``change`` [m, ...] belongs to the distinct segments ``chosen[p]`` of
    parameter ``p``; ``places`` [m] finds them in the group. ``change`` has a gradient.
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


class TrainedSegments:
    """The segments that some requests move together, for each of several kinds of loss.

    ``choices`` holds for each kind the segments [R, L, 2, N] on the paths of R requests (keys, then
    values). A segment on several paths counts once; what different kinds do to one adds up.
    """

    def __init__(self, model: EditableModel, choices: Sequence[Tensor]) -> None:
        weights, biases = {}, {}  # of keys, where the family has them
        for layer, ffn in enumerate(model.ffn):
            for matrix, projection in ((KEY, ffn.key), (VALUE, ffn.value)):
                chosen = [kind[:, layer, matrix].flatten().to(model.device) for kind in choices]
                weights[projection.weight_name, projection.axis] = chosen
                if matrix == KEY and projection.bias_name is not None:
                    biases[projection.bias_name, 0] = chosen
        self._weights = _Group(model, weights)
        self._biases = _Group(model, biases) if biases else None

    @property
    def _groups(self) -> list[_Group]:
        return [self._weights] if self._biases is None else [self._weights, self._biases]

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, with gradients."""
        return [kind.change for group in self._groups for kind in group.kinds]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Write the segments to the live weights by :meth:`write`; put the bits back at the end."""
        self.write()
        try:
            yield
        finally:
            for live in (live for group in self._groups for live in group.lives):
                live.restore()

    def write(self) -> None:
        """Bring the live weights up to date."""
        for group in self._groups:
            group.write()

    def add_gradient(
        self, kind: int, layer: int, matrix: int, residual: Tensor, inner: Tensor
    ) -> None:
        """Add the gradient of one kind of loss, summed over rows and positions.

        ``residual`` [b, T, D] and ``inner`` [b, T, M] are what
        :func:`kmebench.tracing.observe.observed` gives.
        """
        moved = self._weights.kinds[kind]
        parameter = 2 * layer + matrix
        inner = inner.flatten(0, 1).index_select(1, moved.chosen[parameter])
        inner, residual = at_least_float32(inner), at_least_float32(residual.flatten(0, 1))
        moved.gradient(parameter).addmm_(inner.T, residual)
        if matrix == KEY and self._biases is not None:
            self._biases.kinds[kind].gradient(layer).add_(inner.sum(dim=0))

    def delta(self) -> WeightDelta:
        """Return what the segments have become as a delta of the model's weights."""
        return WeightDelta({k: v for group in self._groups for k, v in group.parts().items()})
