"""MEMIT (Meng et al. 2023, "Mass-editing memory in a transformer").

The targets z* of all requests stand at the output of the last edited layer. Layer by layer, each on
the model with the layers before it edited, W2 learns the share of the residual that falls to it:
Δ = R Kᵀ (λC + K Kᵀ)⁻¹.
"""

from collections.abc import Sequence

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import check_layers
from kmebench.editors.changes import low_rank
from kmebench.editors.contexts import MEMIT_LENGTHS
from kmebench.editors.locate.base import LocateAndEdit, naming
from kmebench.editors.locate.cards import MEMITHparams, Site, loss_of
from kmebench.editors.locate.keys import layer_outputs, module_outputs, subject_activations
from kmebench.editors.locate.post_norm import value_change
from kmebench.editors.locate.target_store import stored_targets
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.editors.locate.updates import Factors, memit_update, spread
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel


class MEMIT(LocateAndEdit):
    """All requests of a batch together, spread over several layers."""

    hparams: MEMITHparams
    lengths = MEMIT_LENGTHS
    site: Site = "layer"  # where the targets stand, in the last layer
    root = False  # residuals are spread evenly, not by the square root

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        layers, size = self.hparams.layers, self.micro_batch
        check_layers(self.name, layers, model)
        targets = self._targets(model, requests)
        total = WeightDelta({})
        with self.stopwatch("solve"), model.edits.savepoint():
            for done, layer in enumerate(layers):
                keys = subject_activations(model, requests, self.contexts(model), layer, size).keys
                current = self._current(model, requests)
                share = spread(targets.T, current.T, len(layers) - done, root=self.root)
                residual = self._at_value(model, requests, layer, share)
                with naming(self.name, layer, requests):
                    factors = self._solve(model, layer, residual, keys.T)
                delta = low_rank(model.ffn[layer].value, factors)
                model.apply(delta)
                total += delta
        return total

    def _targets(self, model: EditableModel, requests: Sequence[EditRequest]) -> Tensor:
        """Return z*, [B, D]: of the cached stage, or optimised on the model as it is now."""
        if "targets" in self.assets:
            stored = stored_targets(self.assets["targets"], [r.case_id for r in requests])
            self.stopwatch.add("optimise", stored.seconds)
            self.steps += int(stored.steps.max())
            return stored.values.to(model.device)
        layer, size = self.hparams.layers[-1], self.micro_batch
        loss = loss_of(self.hparams)
        settings = TargetSettings(layer, self.site, **loss, micro_batch=size, anchor=self.anchor)
        with self.stopwatch("optimise"):
            found = optimise_targets(model, requests, self.contexts(model), settings, self.name)
        self.steps += int(found.steps.max())
        return found.values

    def _current(self, model: EditableModel, requests: Sequence[EditRequest]) -> Tensor:
        """Return what now stands where the targets do, [B, D]."""
        return layer_outputs(model, requests, self.hparams.layers[-1], self.micro_batch)

    def _at_value(
        self, model: EditableModel, requests: Sequence[EditRequest], layer: int, share: Tensor
    ) -> Tensor:
        """Return what W2 has to say more, [D, B], so that ``share`` joins the residual stream."""
        ffn = model.ffn[layer]
        if ffn.norm is None:
            return share
        said = module_outputs(model, requests, ffn.value.module, self.micro_batch)
        return value_change(ffn.norm, said, share.T).T

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        """Return Δ for residuals [D, B] and keys [M, B]."""
        inverse = self.inverse(model, layer)
        return memit_update(residual, keys, inverse, self.hparams.moment_weight)
