"""Health of a model state: what its edits did to text that has nothing to do with them.

The unedited model writes neutral texts. On them a state is compared with the unedited model:

    NLL = −(1/N) Σ_t log p(x_t | x_<t),   perplexity = exp NLL,
    KL  =  (1/N) Σ_t Σ_v p0(v | x_<t) log (p0(v | x_<t) / p(v | x_<t))

over the N tokens behind the beginning of each text, which is read and not scored. What the
unedited model says is kept as its normed final states: its head makes p0 of them, exactly, in a
fraction of the space of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch
from kmebench.models.sampling import beginning, sample
from kmebench.precision import at_least_float32

_FORM = "kmebench.neutral_text"


@dataclass(frozen=True)
class NeutralSettings:
    """Which texts are written; the section ``health`` of the config."""

    texts: int = 16
    length: int = 64  # tokens scored of each text
    seed: int = 0  # of their own: no run's seed moves them


@dataclass(frozen=True)
class NeutralText:
    """R texts of B + T tokens, and what the unedited model says of them.

    ``ids`` int64 [R, B + T]: the B tokens that a text begins with (BOS), then T that are scored;
    ``nll`` [R, T]: their negative log-likelihood in nats, float32 (float64 of such a model);
    ``states`` [R, T, D]: the normed final states that predict them, in the model's dtype.
    """

    ids: Tensor
    nll: Tensor
    states: Tensor

    @classmethod
    def written_by(
        cls, model: EditableModel, settings: NeutralSettings, batch_size: int
    ) -> "NeutralText":
        """Have an unedited model write texts, ``batch_size`` of which are read in one pass.

        They are shorter than asked for where the model's context is.
        """
        length = len(beginning(model)) + settings.length
        ids = sample(model, settings.texts, min(length, model.context or length), settings.seed)
        states, nll = [], []
        for batch in _batches(model, ids, ids.shape[1] - len(beginning(model)), batch_size):
            states.append(_final_states(model, batch).cpu())
            nll.append(_nll(model.head(states[-1].to(model.device)), batch.labels).cpu())
        rows = (len(ids), -1)
        kept = torch.cat(states)
        return cls(ids, torch.cat(nll).view(rows), kept.view(*rows, kept.shape[-1]))

    @classmethod
    def open(cls, path: str | Path) -> "NeutralText":
        """Read a file of :meth:`save`.

        Raises:
            KMEBenchError: it is of another format, or damaged.
        """
        file = TensorFile.open(path, _FORM)
        return cls(*(file.tensor(name) for name in ("ids", "nll", "states")))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        write_tensors(path, vars(self), _FORM, {"texts": len(self.ids), "tokens": self.tokens})

    @property
    def tokens(self) -> int:
        """Number of scored tokens N = R T."""
        return self.nll.numel()
