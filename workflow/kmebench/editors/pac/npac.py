"""Natural PAC: PAC with paths and steps measured by what must not change.

PAC moves the segments of largest gradient by Adam. Here a gradient is measured in the metric of
neutral text (:mod:`kmebench.editors.pac.metric`), where a change costs the nats by which it moves
what the model says of everything else:

- a segment's score is how far the loss falls per nat, comparable over layers and matrices;
- a step goes along the natural gradient. It costs at most ``nats``, and is no longer than to where
  the linearised loss vanishes (Polyak 1987), so there is no learning rate;
- only some positions of a prompt write: a fact stands where its subject ends;
- what earlier edits used belongs to the metric of later ones, and what the same prompt reads of
  other subjects to that of an edit.

Sources: natural gradient (Amari 1998), K-FAC (Martens and Grosse 2015), online Laplace (Ritter et
al. 2018), trust region (Schulman et al. 2015). The paper's future work names what follows of them:
layer-adaptive weights, a dynamic number of paths, Locality (Zhai et al. 2025).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Assets, check_layers
from kmebench.editors.contexts import InContexts, prefixes
from kmebench.editors.losses import check_finite
from kmebench.editors.pac.cards import NPACHparams
from kmebench.editors.pac.metric import (
    Positions,
    best_of_each,
    fewest,
    natural_scores,
)
from kmebench.editors.pac.neighbours import neighbours
from kmebench.editors.pac.sides import MatrixMetric, read_matrix_metric
from kmebench.editors.pac.steps import (
    AdamSteps,
    Chosen,
    Matrix,
    NaturalSteps,
    Steps,
    projection_of,
)
from kmebench.editors.pac.texts import Reading, Texts, inputs_noted
from kmebench.edits.weights import WeightDelta
from kmebench.models.early_exit import input_of
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import EncodedSubject, SubjectText, length_sorted_chunks
from kmebench.precision import exact, exact_place, promoted

#: Inputs kept of one matrix, in times of their size, from which on they are compressed.
MOST_KEPT = 2
#: What the next step may cost: after one that raised the loss, so much of its cost; after another
#: so many times the bound before, up to ``nats`` (trust region).
SHRINK, GROW = 0.25, 2.0


class NPAC(InContexts):
    """Natural steps in the FFNs of some layers."""

    hparams: NPACHparams
    _kept: dict[Matrix, tuple[Tensor, ...]]  # inputs that each earlier edit used
    _metrics: dict[Matrix, MatrixMetric]  # with what is kept

    def __init__(self, hparams: NPACHparams, assets: Assets) -> None:
        super().__init__(hparams, assets)
        lengths = ((hparams.context_tokens, hparams.contexts),)
        self.lengths = lengths if hparams.contexts else ()

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`.

        Raises:
            EditError: no gradient reaches the layers: no later token reads the last one.
        """
        check_layers(self.name, self.hparams.layers, model)
        before = prefixes(self.contexts(model))
        texts = [SubjectText.of(r, text, r.target_new) for r in requests for text in before]
        encoded = model.encode_subjects(texts)
        with self.stopwatch("solve"):
            self._read_metrics(model)
            metrics = self._beside_neighbours(model, requests)
        with self.stopwatch("optimise"), model.edits.savepoint():
            delta, used = self._descend(model, requests, encoded, metrics)
        if self.hparams.memory:
            with self.stopwatch("solve"):
                self._keep(used, len(before))
        return delta

    def _descend(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[EncodedSubject],
        metrics: Mapping[Matrix, MatrixMetric],
    ) -> tuple[WeightDelta, dict[Matrix, Tensor]]:
        """Step until every request is learnt; return the change, and the inputs it used."""
        each = len(encoded) // len(requests)
        texts = Texts(model, encoded, each, self.hparams, self.micro_batch)
        total, stepper = WeightDelta({}), None
        nats, loss, cost = self.hparams.nats, torch.inf, 0.0
        for step in range(self.hparams.steps + 1):
            seen = self._read(texts, requests)
            if not texts.fresh and (step == self.hparams.steps or not seen.gradients):
                texts.renew()
                seen = self._read(texts, requests)
            if step == self.hparams.steps or not seen.gradients:
                break
            gradients = {key: Positions.joined(parts) for key, parts in seen.gradients.items()}
            stepper = stepper or self._stepper(model, gradients, metrics)
            # A step that raised the loss went further than its linear model holds.
            mean = float(seen.losses.mean())
            nats = cost * SHRINK if mean > loss else min(nats * GROW, self.hparams.nats)
            loss = mean
            delta, cost = stepper(gradients, seen.losses, each, nats)
            model.apply(delta)
            texts.fresh = False
            total += delta
            self.steps += 1
        return total, {key: torch.cat(parts) for key, parts in seen.inputs.items()}

    def _read(self, texts: Texts, requests: Sequence[EditRequest]) -> Reading:
        """Read the texts of the requests; refuse an infinite loss."""
        seen = texts.read()
        per_request = seen.losses.view(len(requests), -1).sum(dim=1)
        check_finite(self.name, per_request, requests, self.steps, nats=self.hparams.nats)
        return seen

    # -- a step -------------------------------------------------------------------------------

    def _stepper(
        self,
        model: EditableModel,
        gradients: Mapping[Matrix, Positions],
        metrics: Mapping[Matrix, MatrixMetric],
    ) -> Steps:
        """Choose what an edit moves, by its first gradients, and how it steps."""
        chosen = self._choose(gradients, metrics)
        if self.hparams.step == "adam":
            return AdamSteps(model, chosen, self.hparams.learning_rate)
        return NaturalSteps(self.name, model, chosen, self.hparams)

    def _choose(
        self, gradients: Mapping[Matrix, Positions], metrics: Mapping[Matrix, MatrixMetric]
    ) -> dict[Matrix, Chosen]:
        """Choose the segments that are worth most, once for an edit."""
        chosen: Sequence[Tensor | None] = [None] * len(gradients)
        if not self.hparams.whole:
            scores = [
                natural_scores(positions, metrics[key].diagonal, metrics[key].residual)
                for key, positions in gradients.items()
            ]
            paths = self.hparams.paths
            chosen = best_of_each(scores, paths) if paths else fewest(scores, self.hparams.share)
        return {
            key: Chosen(index, *metrics[key].solvers(index))
            for key, index in zip(gradients, chosen, strict=True)
            if index is None or len(index)
        }

    # -- what is kept -------------------------------------------------------------------------

    def _read_metrics(self, model: EditableModel) -> None:
        """Read the metrics that are not there yet, and add what is kept."""
        for layer in self.hparams.layers:
            for matrix in self.hparams.moved:
                key = layer, matrix
                if key in self._metrics:
                    continue
                place = exact_place(projection_of(model, key).weight.device)
                metric = read_matrix_metric(self.assets, self.hparams, *key).to(place)
                for rows in self._kept.get(key, ()):  # edit by edit, as they came: the same bits
                    metric = metric.with_inputs(rows)
                self._metrics[key] = metric

    @torch.no_grad()
    def _beside_neighbours(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> Mapping[Matrix, MatrixMetric]:
        """Return the metrics in which the same prompts about other subjects count as well."""
        if not self.hparams.neighbours:
            return self._metrics
        inputs: dict[Matrix, list[Tensor]] = {}
        texts = [text for r in requests for text in neighbours(r, self.hparams.neighbours)]
        encoded = model.encode_subjects(texts)
        behind = [*model.layers, model.norm][max(self.hparams.layers) + 1]
        for chunk in length_sorted_chunks([len(e.ids) for e in encoded], self.micro_batch):
            batch = model.collate([encoded[i] for i in chunk])
            places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            first = batch.labels.new_tensor([encoded[i].subject_last for i in chunk])[:, None]
            prompt = (first <= places) & (places <= batch.prompt_last[:, None])
            with inputs_noted(model, self.hparams, prompt, inputs):
                input_of(model, behind, input_ids=batch.input_ids)
        weight = self.hparams.neighbour_weight**0.5
        return {
            key: metric.with_inputs(torch.cat(inputs[key]) * weight)
            for key, metric in self._metrics.items()
        }

    def _keep(self, used: Mapping[Matrix, Tensor], n: int) -> None:
        """Keep the inputs of an edit, each of n texts in part.

        Of rows only RᵀR counts, so more of them than can be independent become as many as can.
        """
        for key, inputs in used.items():
            rows = inputs.to(promoted(inputs.dtype)) * (self.hparams.memory / n) ** 0.5
            kept = (*self._kept.get(key, ()), rows)
            if sum(map(len, kept)) > MOST_KEPT * rows.shape[1]:
                kept = (torch.linalg.qr(exact(torch.cat(kept)), mode="r").R.to(rows),)
                del self._metrics[key]  # read again with these: a resumed run has the same bits
            else:
                self._metrics[key] = self._metrics[key].with_inputs(rows)
            self._kept[key] = kept

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contexts, and by matrix the inputs of earlier edits with their numbers."""
        state = super().state_dict()
        for (layer, matrix), parts in self._kept.items():
            state[f"kept.{layer}.{matrix}"] = torch.cat(parts)
            state[f"sizes.{layer}.{matrix}"] = torch.tensor([len(rows) for rows in parts])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore contexts and inputs; an empty state forgets them."""
        super().load_state_dict(state)
        self._kept, self._metrics = {}, {}
        for name, rows in state.items():
            what, *numbers = name.split(".")
            if what == "kept":
                layer, matrix = map(int, numbers)
                sizes = state[f"sizes.{layer}.{matrix}"].tolist()
                self._kept[layer, matrix] = rows.split(sizes)
