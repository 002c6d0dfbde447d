"""The losses of target optimisation: texts that are replayed under the requests' deltas."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kmebench.editors.locate.cards import Site
from kmebench.models.early_exit import first
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import EncodedSubject
from kmebench.models.suffix_cache import Replay


def moved_modules(model: EditableModel, layer: int, site: Site) -> list[nn.Module]:
    """Return the U modules that a δ is added to the output of.

    Behind a norm no δ on the layer's output could be reached by the FFN: it is W2's there too.
    """
    ffn = model.ffn[layer]
    if site == "attention-value":
        return [ffn.value.module, model.attention[layer]]
    return [model.layers[layer] if site == "layer" and ffn.norm is None else ffn.value.module]


def _inside(model: EditableModel, layer: int, site: Site) -> bool:
    """Whether more than the layer's output depends on where the δ are added.

    What PMET adds to the attention changes the input of its own layer's FFN; what is added to W2's
    output may pass through a norm.
    """
    return site == "attention-value" or model.ffn[layer].norm is not None


class Losses(NamedTuple):
    """What b requests lose under their deltas."""

    nll: Tensor  # [b], L(y*), mean over contexts
    kl: Tensor  # [b], KL(p_δ ‖ p0)
    said: Tensor  # [b], bool: the target is the argmax at every place of every context


@dataclass
class TargetRows:
    """The texts of b requests, Q each: prompts with a target, then perhaps the KL prompt."""

    layer: int
    site: Site
    encoded: Sequence[Sequence[EncodedSubject]]
    replay: Replay
    log_p0: Tensor | None = None  # [b, vocabulary], known after the first pass

    @classmethod
    def of(
        cls,
        model: EditableModel,
        encoded: Sequence[Sequence[EncodedSubject]],
        layer: int,
        site: Site,
    ) -> "TargetRows":
        """Run everything that no δ can reach."""
        first_replayed = layer + (not _inside(model, layer, site))
        flat = [e for group in encoded for e in group]
        return cls(layer, site, encoded, Replay.of(model, flat, first_replayed))

    def select(self, kept: Tensor) -> "TargetRows":
        """Return the texts of some requests."""
        n_texts = len(self.encoded[0])
        texts = torch.arange(n_texts, device=kept.device)
        return TargetRows(
            self.layer,
            self.site,
            [self.encoded[i] for i in kept.tolist()],
            self.replay.select((kept[:, None] * n_texts + texts).flatten()),
            None if self.log_p0 is None else self.log_p0[kept.to(self.log_p0.device)],
        )

    def losses(self, deltas: Tensor) -> Losses:
        """Return the losses of every request under ``deltas`` [U, b, D]."""
        hidden = self._final_states(deltas.repeat_interleave(len(self.encoded[0]), dim=1))
        places = self._places
        logits = self.replay.model.head(hidden[places.rows, places.columns])
        n_answers = len(places.labels)
        nll = cross_entropy(logits[:n_answers], places.labels, reduction="none")
        total = nll.new_zeros(len(self.encoded)).index_add(0, places.owners, nll / places.parts)
        wrong = (logits[:n_answers].argmax(dim=-1) != places.labels).to(nll.dtype)
        said = wrong.new_zeros(len(self.encoded)).index_add(0, places.owners, wrong) == 0
        if n_answers == len(logits):
            return Losses(total, torch.zeros_like(total), said)
        log_p = logits[n_answers:].log_softmax(dim=-1)
        if self.log_p0 is None:  # no δ has moved yet
            self.log_p0 = log_p.detach()
        return Losses(total, (log_p.exp() * (log_p - self.log_p0)).sum(dim=-1), said)

    def _final_states(self, deltas: Tensor) -> Tensor:
        """Return the normed final states [b * Q, S, D]; ``deltas`` [U, b * Q, D]."""
        model, layer = self.replay.model, self.layer
        if not _inside(model, layer, self.site):
            return self.replay.run(_at_subject(self.replay.states, deltas[0]))
        with ExitStack() as stack:
            for module, delta in zip(moved_modules(model, layer, self.site), deltas, strict=True):
                stack.enter_context(_added(module, delta))
            return self.replay.run(self.replay.states)

    @cached_property
    def _places(self) -> "_Places":
        """Where the head is applied, and what it should say there."""
        rows, columns, owners, labels, parts = (list[int]() for _ in range(5))
        last_rows, last_columns = list[int](), list[int]()
        for row, (owner, item) in enumerate(
            (i, e) for i, group in enumerate(self.encoded) for e in group
        ):
            end = len(item.ids) - 1 - item.subject_last  # replayed column of the last token
            if item.n_target == 0:
                last_rows.append(row)
                last_columns.append(end)
                continue
            n_prompts = sum(e.n_target > 0 for e in self.encoded[owner])
            rows += [row] * item.n_target
            columns += range(end - item.n_target, end)
            owners += [owner] * item.n_target
            labels += item.target_ids
            parts += [n_prompts * item.n_target] * item.n_target
        device = self.replay.model.device
        return _Places(
            *(torch.tensor(x, device=device) for x in (rows + last_rows, columns + last_columns)),
            *(torch.tensor(x, device=device) for x in (owners, labels, parts)),
        )


class _Places(NamedTuple):
    """A answer places of prompts, then the last places of the KL prompts."""

    rows: Tensor
    columns: Tensor
    owners: Tensor  # [A], request among b
    labels: Tensor  # [A]
    parts: Tensor  # [A], prompts times tokens: a request's sum of nll / parts is the mean of means


def _at_subject(states: Tensor, deltas: Tensor) -> Tensor:
    """Add one delta [R, D] to the first column of each row of states [R, S, D]."""
    moved = (states[:, 0] + deltas.to(states.device)).to(states.dtype)
    return torch.cat([moved[:, None], states[:, 1:]], dim=1)


@contextmanager
def _added(module: nn.Module, deltas: Tensor) -> Iterator[None]:
    """Add deltas to what a module says at the subjects while the block runs."""

    def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        moved = _at_subject(first(output), deltas)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with module.register_forward_hook(add):
        yield
