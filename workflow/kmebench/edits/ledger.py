"""The ledger of edits: exact revert, and masters that lose no small update.

For everything that deltas touch, the ledger keeps the original values in the model's dtype
(revert restores them bit by bit) and a float32 master to which deltas are added; the live
weight is the rounded master. In bfloat16 thousands of updates smaller than half a unit in the
last place would otherwise vanish. Segments are kept apart from whole matrices, so memory and
time follow what was touched, not the size of the model.
"""

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Overlay
from kmebench.edits.weights import Columns, Dense, Part, Rows, WeightDelta, put_segments
from kmebench.precision import at_least_float32


class Ledger:
    """Applies edits to the named parameters of one model and remembers what was there.

    ``overlays`` are the overlays that act now, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._entries: dict[str, _Segments | _Whole] = {}
        self.overlays: Mapping[str, Overlay] = {}
        #: Inside a savepoint: what has been touched since, as it was (None: untouched).
        self._before: dict[str, _Segments | _Whole | None] | None = None

    @torch.no_grad()
    def apply(self, edit: Edit | WeightDelta) -> None:
        """Add an edit's weights to the masters, write the touched weights, set its overlays."""
        edit = Edit.of(edit)
        for name, part in edit.weights.items():
            self._entry(name, part).add(part)
        self.overlays = {**self.overlays, **edit.overlays}

    @torch.no_grad()
    def revert(self) -> None:
        """Restore every touched weight to its original bits, and forget all edits."""
        for name in list(self._entries):
            self._remember(name)
            self._entries.pop(name).restore()
        self.overlays = {}

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Put everything back, bit by bit, as it was when the block began.

        Memory follows what the block touches. Savepoints may be nested.
        """
        outer, overlays = self._before, self.overlays
        self._before = {}
        try:
            yield
        finally:
            touched, self._before = self._before, outer
            self.overlays = overlays
            with torch.no_grad():
                for name, before in touched.items():
                    self._return(name, before)

    def _return(self, name: str, before: "_Segments | _Whole | None") -> None:
        if name in self._entries:
            self._entries.pop(name).restore()
        if before is not None:
            before.rewrite()
            self._entries[name] = before

    def _remember(self, name: str) -> None:
        """Keep what a savepoint has to return."""
        if self._before is not None and name not in self._before:
            entry = self._entries.get(name)
            self._before[name] = None if entry is None else copy.copy(entry).cloned()

    def total(self) -> Edit:
        """Return all edits so far as one: master − original, and the overlays.

        Parameters have the model's order; what was touched first a resumed run does not know.
        """
        touched = [name for name in self._parameters if name in self._entries]
        weights = {name: self._entries[name].total() for name in touched}
        return Edit(WeightDelta(weights), self.overlays)

    @property
    def touched(self) -> Set[str]:
        """Names of the parameters that edits have touched."""
        return self._entries.keys()

    def original(self, name: str) -> Tensor:
        """Return a parameter as it was before any edit; never the live weight itself."""
        entry = self._entries.get(name)
        if entry is None:
            return self._parameters[name].detach().clone()
        return entry.full_original()

    def master(self, name: str) -> Tensor:
        """Return a whole parameter at master precision; not to be changed in place.

        It is no copy where there is a master of all of it: the next edit adds to that.
        """
        entry = self._entries.get(name)
        if isinstance(entry, _Whole):
            return entry.master
        live = at_least_float32(self._parameters[name].detach()).clone()
        return live if entry is None else entry.full_master(live)

    def residual(self, name: str, axis: int, index: Tensor) -> Tensor:
        """Return master − live weight of some segments, [n, segment size]."""
        live = at_least_float32(self._parameters[name].detach().movedim(axis, 0)[index])
        entry = self._entries.get(name)
        if entry is None:
            return torch.zeros_like(live)
        return entry.masters_of(axis, index, live) - live

    def state(self) -> dict[str, Tensor]:
        """Return the masters of all that was touched; with the originals, the whole state."""
        return WeightDelta({name: each.masters() for name, each in self._entries.items()}).tensors()

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a freshly loaded model into a state saved by :meth:`state`, bit by bit."""
        for name, part in WeightDelta.from_tensors(state).items():
            self._entry(name, part).set(part)

    def _entry(self, name: str, part: Part) -> "_Segments | _Whole":
        self._remember(name)
        entry = self._entries.get(name)
        if entry is None:
            sparse = type(part) if isinstance(part, Rows | Columns) else None
            parameter = self._parameters[name]
            entry = _Segments(parameter, sparse) if sparse else _Whole(parameter)
        elif isinstance(entry, _Segments) and entry.kind is not type(part):
            entry = entry.widened()
        self._entries[name] = entry
        return entry


class _Whole:
    """A parameter touched everywhere."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.original = parameter.detach().clone()
        self.master = at_least_float32(self.original).clone()

    def add(self, part: Part) -> None:
        self.master += part.dense(self.parameter.shape).to(self.master)
        self.parameter.copy_(self.master)

    def set(self, part: Part) -> None:
        self.master.copy_(part.dense(self.parameter.shape))
        self.parameter.copy_(self.master)

    def restore(self) -> None:
        self.parameter.copy_(self.original)

    def rewrite(self) -> None:
        self.parameter.copy_(self.master)

    def cloned(self) -> "_Whole":
        self.master = self.master.clone()
        return self

    def total(self) -> Part:
        return Dense(self.master - self.original)

    def masters(self) -> Part:
        return Dense(self.master)

    def full_original(self) -> Tensor:
        return self.original

    def full_master(self, live: Tensor) -> Tensor:
        return self.master.clone()

    def masters_of(self, axis: int, index: Tensor, live: Tensor) -> Tensor:
        return self.master.movedim(axis, 0)[index]


class _Segments:
    """A parameter touched in some segments; storage doubles when it is full."""

    def __init__(self, parameter: nn.Parameter, kind: type[Rows] | type[Columns]) -> None:
        self.parameter, self.kind = parameter, kind
        self.view = parameter.detach().movedim(kind.axis, 0)  # shares the weight's memory
        self.slot = torch.full((len(self.view),), -1, device=parameter.device)
        self.index = self.slot.new_empty(0)
        self.original = self.view[:0].clone()
        self.master = at_least_float32(self.original)

    @property
    def n(self) -> int:
        return len(self.index)

    def _slots(self, index: Tensor) -> Tensor:
        """Return the storage slots of ``index``, making new ones where there are none."""
        new = index[self.slot[index] < 0]
        if len(new):
            needed = self.n + len(new)
            if needed > len(self.original):
                capacity = min(max(2 * len(self.original), needed), len(self.view))
                self.original = _grown(self.original, capacity)
                self.master = _grown(self.master, capacity)
            self.original[self.n : needed] = self.view[new]
            self.master[self.n : needed] = at_least_float32(self.view[new])
            self.slot[new] = torch.arange(self.n, needed, device=new.device)
            self.index = torch.cat([self.index, new])
        return self.slot[index]

    def add(self, part: Part) -> None:
        assert isinstance(part, self.kind)  # see Ledger._entry
        index = part.index.to(self.slot.device)
        slots = self._slots(index)
        self.master[slots] += part.values.to(self.master)
        self._write(index, self.master[slots])

    def set(self, part: Part) -> None:
        assert isinstance(part, self.kind)
        index = part.index.to(self.slot.device)
        slots = self._slots(index)
        self.master[slots] = part.values.to(self.master)
        self._write(index, self.master[slots])

    def _write(self, index: Tensor, values: Tensor) -> None:
        live = self.parameter.detach()
        put_segments(live, self.kind.axis, index, values.to(live.dtype))

    def restore(self) -> None:
        self._write(self.index, self.original[: self.n])

    def rewrite(self) -> None:
        self._write(self.index, self.master[: self.n])

    def cloned(self) -> "_Segments":
        self.slot, self.original, self.master = (
            tensor.clone() for tensor in (self.slot, self.original, self.master)
        )
        return self

    def total(self) -> Part:
        return self.kind.summed(self.index, self.master[: self.n] - self.original[: self.n])

    def masters(self) -> Part:
        return self.kind(self.index, self.master[: self.n])

    def full_original(self) -> Tensor:
        original = self.parameter.detach().clone()
        put_segments(original, self.kind.axis, self.index, self.original[: self.n])
        return original

    def full_master(self, live: Tensor) -> Tensor:
        put_segments(live, self.kind.axis, self.index, self.master[: self.n])
        return live

    def masters_of(self, axis: int, index: Tensor, live: Tensor) -> Tensor:
        if axis != self.kind.axis:
            return self.full_master(at_least_float32(self.parameter.detach()).clone()).movedim(
                axis, 0
            )[index]
        slots = self.slot[index]
        known = slots >= 0
        masters = live.clone()
        masters[known] = self.master[slots[known]]
        return masters

    def widened(self) -> _Whole:
        """Turn into an entry for the whole parameter, at the same state."""
        whole = _Whole(self.parameter)
        whole.original = self.full_original()
        whole.master = self.full_master(at_least_float32(self.parameter.detach()).clone())
        return whole


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    grown = tensor.new_empty(capacity, *tensor.shape[1:])
    grown[: len(tensor)] = tensor
    return grown
