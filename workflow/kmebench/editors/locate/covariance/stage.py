"""Covariance as a cached stage: one pass over the text for all layers, resumable.

    C = (1/n) Σ_t k_t k_tᵀ,   k_t = input of W2 at token t

(Meng et al. 2022, "Locating and editing factual associations in GPT", section 3.1 and appendix
E.5; there 100,000 samples of Wikipedia). C decides where an edit may write: it is inverted, or
its small eigenvalues are looked for, so it must be right where it is small.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.covariance.texts import TextSettings, text_batches
from kmebench.editors.needs import few_tokens
from kmebench.errors import ConfigError, DataError
from kmebench.io.files import atomic_path
from kmebench.io.logs import announce, track
from kmebench.models.editable import EditableModel
from kmebench.precision import at_least_float32, exact_place

logger = logging.getLogger("kmebench")

#: Tokens whose keys are multiplied in one product.
_BLOCK = 4096
#: Saved states on the way.
_SAVES = 10


class Sums:
    """Running sums Σ k kᵀ of several layers, [M, M] float64 each.

    Products are of blocks of keys in float32 and are added up in float64, so that rounding does
    not grow with the text: what remains, about 1e-7 of an entry, is that of the float32 file.
    Sums lie with their layer, or on the CPU where the device has no float64.
    """

    def __init__(self, model: EditableModel, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.total: dict[int, Tensor] = {}
        for layer in layers:
            place = exact_place(model.ffn[layer].value.weight.device)
            width = model.ffn[layer].value.width
            self.total[layer] = torch.zeros(width, width, dtype=torch.float64, device=place)
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, keys: Tensor) -> None:
        """Add keys [n, M] of a layer; they are multiplied when a block of them is there."""
        self._waiting[layer].append(keys)
        if sum(len(k) for k in self._waiting[layer]) >= _BLOCK:
            self._multiply(layer)

    def settle(self) -> None:
        """Multiply what is still waiting."""
        for layer in self.layers:
            if self._waiting[layer]:
                self._multiply(layer)

    def _multiply(self, layer: int) -> None:
        keys = at_least_float32(torch.cat(self._waiting[layer]))
        self._waiting[layer] = []
        self.total[layer] += (keys.T @ keys).to(self.total[layer])


class Pass:
    """One pass over the text: sums, tokens and batches so far, saved every tenth of the way.

    The saved state is no output of the stage (Snakemake deletes those of a killed job) and
    goes when the pass is complete. A state of another identity is never resumed.
    """

    def __init__(
        self, partial: Path, identity: Mapping[str, Any], sums: Sums, settings: TextSettings
    ) -> None:
        self.partial, self.sums, self.settings = partial, sums, settings
        self.identity = json.dumps(identity, sort_keys=True)
        self.tokens = self.batches = 0

    def run(self, model: EditableModel) -> Iterator[int]:
        """Read the rest of the text; yield the tokens read so far after each batch."""
        self._restore()
        saved = self.tokens
        for batch in text_batches(model, self.settings, self.batches):
            batch.feed(model, self.sums.layers, self.sums.add)
            self.sums.settle()
            self.tokens += batch.tokens
            self.batches += 1
            if self.tokens - saved >= self.settings.tokens / _SAVES:
                self._save()
                saved = self.tokens
            yield self.tokens

    def _save(self) -> None:
        metadata = {
            "identity": self.identity,
            "tokens": str(self.tokens),
            "batches": str(self.batches),
        }
        tensors = {str(layer): total.cpu() for layer, total in self.sums.total.items()}
        with atomic_path(self.partial) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _restore(self) -> None:
        if not self.partial.is_file():
            return
        try:
            with safe_open(str(self.partial), framework="pt") as stream:
                metadata = stream.metadata() or {}
                if metadata.get("identity") != self.identity:
                    logger.info("%s is of another pass: starting afresh", self.partial)
                    return
                for layer, total in self.sums.total.items():
                    total.copy_(stream.get_tensor(str(layer)))
        except SafetensorError as error:
            logger.info("%s cannot be read (%s): starting afresh", self.partial, error)
            return
        self.tokens, self.batches = int(metadata["tokens"]), int(metadata["batches"])
        logger.info("resumed after %d tokens", self.tokens)


def measure_covariance(
    path: str | Path,
    model: EditableModel,
    layers: Sequence[int],
    settings: TextSettings,
    *,
    force: bool = False,
    code: Mapping[str, str] | None = None,
) -> None:
    """Write C of ``layers`` to ``path``, going on from the state of a killed pass.

    ``code`` (file -> digest) belongs to the identity of that state. ``force`` allows fewer
    tokens than M, where C cannot have full rank.

    Raises:
        ConfigError: there is no layer, or not such a one, or there are too few tokens.
        DataError: the text cannot be had.
    """
    layers = sorted(set(layers))
    if not layers:
        raise ConfigError(
            "covariance: no layer is asked for; an experiment or comparison on this model must "
            "name a method that reads them (ROME, MEMIT or one of their family)."
        )
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise ConfigError(
            f"covariance: layers {layers} are not all among the model's 0 to {model.n_layers - 1}; "
            f"set the layers of the methods that read it, for this model, or delete {path} if an "
            "earlier model has left it."
        )
    _check_tokens(settings.tokens, model.ffn_width, force)
    identity = {
        "layers": layers,
        "settings": vars(settings) | {"text": dict(settings.text)},
        "weights": [_digest(model, layer) for layer in layers],
        "code": dict(code or {}),
    }
    partial = Path(f"{path}.partial")
    reading = Pass(partial, identity, Sums(model, layers), settings)
    thousands = -(-settings.tokens // 1000)
    for _ in track(_thousands(reading.run(model)), "thousand tokens of the covariance", thousands):
        pass
    if not reading.tokens:
        raise DataError(f"covariance: the text of {dict(settings.text)} has no tokens.")
    if reading.tokens < settings.tokens:
        logger.info("the text ended after %d of %d tokens", reading.tokens, settings.tokens)
        _check_tokens(reading.tokens, model.ffn_width, force)
    covariance = {layer: (t / reading.tokens).float() for layer, t in reading.sums.total.items()}
    write_covariance(path, covariance, reading.tokens, settings.text)
    partial.unlink(missing_ok=True)


def _check_tokens(tokens: int, width: int, force: bool) -> None:
    """Refuse fewer tokens than dimensions, unless they are ``force``d; warn of few."""
    if tokens < width and not force:
        raise ConfigError(
            f"covariance: {tokens} tokens cannot fill a matrix of width {width}; take a "
            "longer text or raise covariance.tokens, or set covariance.force to go on all the same."
        )
    if few := few_tokens(tokens, width):
        announce(few, logging.WARNING)


def _digest(model: EditableModel, layer: int) -> float:
    """Tell one model from another (retrained, say) by a sum over its W2."""
    return float(model.ffn[layer].value.weight.detach().float().sum())


def _thousands(tokens: Iterator[int]) -> Iterator[None]:
    """Yield once for every thousand tokens begun, for the display of progress."""
    shown = 0
    for done in tokens:
        while shown * 1000 < done:
            shown += 1
            yield
