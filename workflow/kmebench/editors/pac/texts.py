"""The texts of an edit, read again after every step.

Steps are taken for the positions that write, and the metric of neutral text keeps other keys as
they are. So what stands before the first of these positions hardly moves: its attention keys and
values, and all below the lowest edited layer, are read once and kept
(:mod:`kmebench.models.suffix_cache`). They are those of the weights at the last
:meth:`Texts.renew`; whether a request is learnt is decided by a fresh reading.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmebench.editors.losses import row_losses
from kmebench.editors.pac.cards import NPACHparams
from kmebench.editors.pac.gradients import observed
from kmebench.editors.pac.metric import Positions
from kmebench.editors.pac.steps import Matrix, projection_of
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, EncodedSubject, length_sorted_chunks
from kmebench.models.hooks import hooked
from kmebench.models.suffix_cache import Replay


@dataclass
class Reading:
    """What the texts of some requests gave, position by position."""

    losses: Tensor  # [texts], in nats per target token
    gradients: dict[Matrix, list[Positions]] = field(default_factory=dict)  # of what is not learnt
    inputs: dict[Matrix, list[Tensor]] = field(default_factory=dict)  # of the matrices


@dataclass(frozen=True)
class _Chunk:
    """Texts of some requests, to be replayed from the first position that writes."""

    rows: Tensor  # [R], which of all texts
    batch: Batch
    replay: Replay

    @classmethod
    def of(
        cls, model: EditableModel, rows: Tensor, items: Sequence[EncodedSubject], start: int
    ) -> "_Chunk":
        return cls(rows, model.collate(items), Replay.of(model, items, start))

    def writing(self, positions: str) -> Tensor:
        """Say which of the replayed positions write, [R, S]."""
        columns = torch.arange(self.replay.states.shape[1], device=self.replay.lengths.device)
        ends = torch.ones_like(self.replay.lengths)
        return columns < (ends if positions == "subject_last" else self.replay.lengths)[:, None]

    def losses(self) -> Tensor:
        """Replay; return the loss of each text, [R]."""
        hidden, batch = self.replay.run(self.replay.states), self.batch
        columns = batch.positions - self.replay.offsets.to(batch.rows.device)[batch.rows]
        answers = hidden[batch.rows.to(hidden.device), columns.to(hidden.device)]
        return row_losses(self.replay.model.head(answers), batch.labels, batch)


class Texts:
    """The texts of some requests, ``each`` of one, request by request."""

    def __init__(
        self,
        model: EditableModel,
        encoded: Sequence[EncodedSubject],
        each: int,
        hparams: NPACHparams,
        micro_batch: int,
    ) -> None:
        whole = hparams.positions == "all"
        self._items = [replace(item, subject_last=0) if whole else item for item in encoded]
        self._model, self.each, self._hparams = model, each, hparams
        groups = [encoded[i : i + each] for i in range(0, len(encoded), each)]
        lengths = [max(len(item.ids) for item in group) for group in groups]
        self._chunked = list(length_sorted_chunks(lengths, micro_batch))
        self.renew()

    def renew(self) -> None:
        """Read, on the live weights, what stands before the positions that write."""
        start, each = min(self._hparams.layers), torch.arange(self.each)
        self._chunks = [
            _Chunk.of(self._model, rows, [self._items[i] for i in rows.tolist()], start)
            for chunk in self._chunked
            for rows in [(torch.tensor(chunk)[:, None] * self.each + each).flatten()]
        ]
        self.fresh = True

    def read(self) -> Reading:
        """Read all texts; go back from those of requests that are not learnt."""
        seen = Reading(torch.zeros(len(self._items), dtype=torch.float64))
        for chunk in self._chunks:
            seen.losses[chunk.rows] = self._read(chunk, seen).cpu().double()
        return seen

    def _read(self, chunk: _Chunk, seen: Reading) -> Tensor:
        """Read a chunk; return the losses of its texts, [R]."""
        writing = chunk.writing(self._hparams.positions)
        learning = torch.zeros(len(chunk.rows), dtype=torch.bool, device=writing.device)

        def receive(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
            if matrix not in self._hparams.moved:
                return
            here = (writing & learning[:, None]).to(inner.device)
            owner = chunk.rows.to(here.device)[here.nonzero()[:, 0]]
            part = Positions(residual[here], inner[here], owner)
            seen.gradients.setdefault((layer, matrix), []).append(part)

        layers = self._hparams.layers
        with (
            observed(self._model, receive, layers),
            inputs_noted(self._model, self._hparams, writing, seen.inputs),
        ):
            losses = chunk.losses()
            above = losses.detach().view(-1, self.each).mean(dim=1) >= self._hparams.tolerance
            learning |= above.repeat_interleave(self.each).to(learning.device)
            if learning.any():
                losses[learning.to(losses.device)].sum().backward()
        return losses.detach()


@contextmanager
def inputs_noted(
    model: EditableModel, hparams: NPACHparams, where: Tensor, noted: dict[Matrix, list[Tensor]]
) -> Iterator[None]:
    """Note the inputs of the matrices at some positions, ``where`` [R, T], in the block."""

    def noting(key: Matrix) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            here = args[0].detach()[where.to(args[0].device)]
            noted.setdefault(key, []).append(here)

        return note

    def handles() -> Iterator[RemovableHandle]:
        for layer in hparams.layers:
            for matrix in hparams.moved:
                module = projection_of(model, (layer, matrix)).module
                yield module.register_forward_pre_hook(noting((layer, matrix)))

    with hooked(handles()):
        yield
