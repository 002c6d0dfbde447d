"""ROME (Meng et al. 2022, "Locating and editing factual associations in GPT").

One layer's W2 learns one pair by a change of rank one, Δ = (v* − o) uᵀ / (kᵀ u), u = C⁻¹ k*, with
k* the subject's key averaged over contexts and v* what W2 should say there; k and o are of the bare
prompt.
"""

from collections.abc import Sequence

from kmebench.data.records import SLOT, EditRequest
from kmebench.editors.base import check_layers
from kmebench.editors.changes import low_rank
from kmebench.editors.contexts import ROME_LENGTHS
from kmebench.editors.locate.base import LocateAndEdit, naming
from kmebench.editors.locate.cards import ROMEHparams, loss_of
from kmebench.editors.locate.keys import Activations, subject_activations
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.editors.locate.updates import rome_update
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel


class ROME(LocateAndEdit):
    """Requests one after another, each on the model with the earlier ones."""

    hparams: ROMEHparams
    lengths = ROME_LENGTHS

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests``; see :meth:`Editor.edit`."""
        layer = self.hparams.layer
        check_layers(self.name, (layer,), model)
        self.contexts(model)
        total = WeightDelta({})
        with model.edits.savepoint():
            for request in requests:
                delta = self._update(model, request)
                model.apply(delta)
                total += delta
        return total

    def _update(self, model: EditableModel, request: EditRequest) -> WeightDelta:
        layer = self.hparams.layer
        groups = self.contexts(model)
        contexts = (tuple(template for group in groups for template in group),)  # one mean
        with self.stopwatch("optimise"):
            settings = TargetSettings(layer, "value", **loss_of(self.hparams), anchor=self.anchor)
            targets = optimise_targets(model, [request], contexts, settings, self.name)
        self.steps += int(targets.steps)
        if targets.given_up:  # R-ROME's probe would differ from what W2 says now
            return WeightDelta({})
        with self.stopwatch("solve"), naming(self.name, layer, [request]):
            averaged = subject_activations(model, [request], contexts, layer, 1)
            probe = self._probe(model, request, averaged)
            inverse = self.inverse(model, layer) if self.hparams.second_moment else None
            factors = rome_update(
                targets.values[0], probe.outputs[0], averaged.keys[0], probe.keys[0], inverse
            )
            return low_rank(model.ffn[layer].value, factors)

    def _probe(
        self, model: EditableModel, request: EditRequest, averaged: Activations
    ) -> Activations:
        """Return the key that is to be mapped to v*, and what W2 says of it now."""
        return subject_activations(model, [request], ((SLOT,),), self.hparams.layer, 1)
