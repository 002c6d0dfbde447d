"""Editors with a trained network: a gradient on the model as it is, made into one change."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.hyper.cards import HyperHparams
from kmebench.editors.hyper.network import Hypernetwork
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.rows import Rows, Site, rows_of, sites_of
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Encoded, length_sorted_chunks


class HyperEditor(Editor):
    """All requests of a call from one gradient, by the network of the stage ``hypernetwork``."""

    hparams: HyperHparams
    network: ClassVar[type[Hypernetwork]]
    _trained: Hypernetwork | None = None

    @abstractmethod
    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the texts and positions, [N] each, whose rows the network reads."""

    @abstractmethod
    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the loss of several requests from the mean per token of each, [R]."""

    @abstractmethod
    def kept(self, encoded: Encoded) -> Encoded:
        """Return a text with that part as its target where training wants the model unchanged."""

    def used(self, rows: Rows) -> Rows:
        """Return the rows that the network reads: all of them."""
        return rows

    def sites(self, model: EditableModel) -> list[Site]:
        """Return the matrices that are edited.

        Raises:
            ConfigError: the model does not have them.
        """
        return sites_of(self.name, self.hparams, model)

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        sites = self.sites(model)
        if self._trained is None:
            shapes, path = [site.shape for site in sites], self.assets["hypernetwork"]
            self._trained = self.network.load(path, shapes, self.hparams).to(model.device)
        with self.stopwatch("trace"):
            seen = self.traced(model, sites, requests, self.micro_batch)
        self.steps += 1
        with self.stopwatch("solve"):
            return total(sites, factors_of(self._trained, seen))

    def traced(
        self,
        model: EditableModel,
        sites: Sequence[Site],
        requests: Sequence[EditRequest],
        micro_batch: int,
    ) -> list[list[Rows]]:
        """Return the rows of every request, site by site, on the model as it is."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        found: list[list[Rows]] = [[] for _ in requests]
        for chunk in length_sorted_chunks([len(e.ids) for e in encoded], micro_batch):
            asked, texts = [requests[i] for i in chunk], [encoded[i] for i in chunk]
            for index, rows in zip(chunk, self._pass(model, sites, asked, texts), strict=True):
                found[index] = rows
        return found

    def _pass(
        self,
        model: EditableModel,
        sites: Sequence[Site],
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
    ) -> list[list[Rows]]:
        """Return the rows of some requests, of one pass forward and back."""
        batch = model.collate(encoded)
        places = self.places(batch)

        def loss() -> Tensor:
            losses = row_losses(model.answer_logits(batch), batch.labels, batch)
            rate = self.hparams.step_size
            check_finite(self.name, losses.detach(), requests, self.steps, step_size=rate)
            return self.loss(losses, batch)

        seen = rows_of(model, sites, min(self.hparams.layers), places, loss)
        counts = torch.bincount(places[0], minlength=len(encoded)).tolist()
        cut = [zip(*(part.split(counts) for part in rows), strict=True) for rows in seen]
        return [[self.used(Rows(*rows)) for rows in of_all] for of_all in zip(*cut, strict=True)]


def factors_of(
    network: Hypernetwork, seen: Sequence[Sequence[Rows]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of one change of every site by all requests, with their graph."""
    joint = [Rows.joint(parts) for parts in zip(*seen, strict=True)]
    return [network.factors(site, rows) for site, rows in enumerate(joint)]


def total(sites: Sequence[Site], factors: Sequence[tuple[Tensor, Tensor]]) -> WeightDelta:
    """Return the changes of all sites as one, without a graph."""
    change = WeightDelta({})
    for site, (u, v) in zip(sites, factors, strict=True):
        change += site.change(u.detach(), v.detach())
    return change


def every_place(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the texts and positions of all tokens that are read, without padding."""
    lengths = batch.prompt_last + batch.counts
    positions = torch.arange(batch.input_ids.shape[1], device=lengths.device)
    texts, places = (positions < lengths[:, None]).nonzero(as_tuple=True)
    return texts, places
