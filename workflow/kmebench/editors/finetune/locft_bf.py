"""LocFT-BF: localized fine-tuning, breadth first (Yang et al. 2026, "Fine-tuning done right").

    minimise the mean over all facts of −(1/n) Σ_j log P(y_j | x, y_<j) over one matrix or layer

by Adam in shuffled mini-batches over many passes, without a constraint. The target ends in the
end-of-text token, which is one of its n tokens. In a call of one request this is the depth-first
scheme that the paper shows to fail.
"""

from collections.abc import Sequence

from kmebench.data.records import EditRequest
from kmebench.editors.base import check_layers
from kmebench.editors.finetune.cards import LocFTBFHparams
from kmebench.editors.finetune.training import FineTuning, Trained
from kmebench.errors import ConfigError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded
from kmebench.models.layouts import layer_parameters, layout_of


class LocFTBF(FineTuning):
    """Fine-tuning of one place on all requests, in passes of mini-batches."""

    hparams: LocFTBFHparams

    def encode(self, model: EditableModel, requests: Sequence[EditRequest]) -> list[Encoded]:
        """Return the tokens of every prompt with its target and the end of text.

        Raises:
            ConfigError: the tokenizer has no token for the end of a text.
        """
        encoded = super().encode(model, requests)
        if not self.hparams.append_eos:
            return encoded
        end = model.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                f"{self.name}: the tokenizer has no end-of-text token; set append_eos: false."
            )
        # It is only predicted, never fed: a text that fits the context still does.
        return [Encoded((*item.ids, end), item.n_target + 1) for item in encoded]

    def trained(self, model: EditableModel) -> dict[str, Trained]:
        """Return W2 or W1 of the layer, or all its parameters."""
        layer, what = self.hparams.layer, self.hparams.parameters
        check_layers(self.name, (layer,), model)
        if what == "layer":
            found = layer_parameters(model.model, layout_of(model.model.config), layer)
            return {name: Trained(parameter) for name, parameter in found.items()}
        ffn = model.ffn[layer]
        return Trained.by_name([ffn.value if what == "value" else ffn.key])
