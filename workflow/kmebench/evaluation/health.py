"""Health of a model state: what its edits did to text that has nothing to do with them.

The unedited model writes neutral texts. On them a state is compared with the unedited model:

    NLL = −(1/N) Σ_t log p(x_t | x_<t),   perplexity = exp NLL,
    KL  =  (1/N) Σ_t Σ_v p0(v | x_<t) log (p0(v | x_<t) / p(v | x_<t))

over the N tokens behind the beginning of each text, which is read and not scored. What the
unedited model says is kept as its normed final states: its head makes p0 of them, exactly, in a
fraction of the space of the logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Encoded
from kmebench.models.sampling import beginning, sample
from kmebench.precision import at_least_float32, exact

_FORM = "kmebench.neutral_text"


@dataclass(frozen=True)
class NeutralSettings:
    """Which texts are written; the section ``health`` of the config."""

    texts: int
    length: int  # tokens scored of each text
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
    @torch.no_grad()
    def written_by(
        cls, model: EditableModel, settings: NeutralSettings, batch_size: int
    ) -> "NeutralText":
        """Have an unedited model write texts, ``batch_size`` of which are read in one pass.

        They are shorter than asked for where the model's context is. Read in the same batches, by
        the same machine, the texts give the unedited model its own bits again.
        """
        begun = len(beginning(model))
        length = min(begun + settings.length, model.context or begun + settings.length)
        ids = sample(model, settings.texts, length, settings.seed)
        states, nll = [], []
        for batch in _batches(model, ids, length - begun, batch_size):
            passed = model.final_states(batch)
            states.append(passed.cpu())
            nll.append(_nll(model.head(passed), batch.labels).cpu())
        shape = (len(ids), length - begun)
        return cls(ids, torch.cat(nll).view(shape), torch.cat(states).view(*shape, -1))

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


def health(model: EditableModel, neutral: NeutralText, batch_size: int) -> dict[str, float]:
    """Measure a model state on neutral text, ``batch_size`` texts in one pass.

    Returns tokens, perplexity, perplexity_ratio (to the unedited model's), nll_difference (nats
    per token), kl (nats) and same_argmax (share of positions). Of the unedited model, in the
    batches that the texts were read in, the last four are exactly 1, 0, 0 and 1. Out of memory,
    it tries once more with half the batch.

    Raises:
        NoMemoryError: half the batch did not fit either.
    """
    return halved_if_needed(
        lambda size: _health(model, neutral, size),
        batch_size,
        "reading neutral text",
        "lower evaluation.batch_size, or choose a smaller dtype",
    )


@torch.no_grad()
def _health(model: EditableModel, neutral: NeutralText, batch_size: int) -> dict[str, float]:
    head, length = _original_head(model), neutral.nll.shape[1]
    nll = kl = same = 0.0
    batches = _batches(model, neutral.ids, length, batch_size)
    states = neutral.states.split(batch_size)
    for batch, original in zip(batches, states, strict=True):
        logits = model.answer_logits(batch)
        wanted = head(original.flatten(0, 1).to(logits.device))
        nll += exact(_nll(logits, batch.labels)).sum().item()
        texts = zip(wanted.split(length), logits.split(length), strict=True)
        kl += sum(exact(_kl(p0, p)).sum().item() for p0, p in texts)  # text by text: memory
        same += (logits.argmax(dim=-1) == wanted.argmax(dim=-1)).sum().item()
    mean, before = (x / neutral.tokens for x in (nll, _total(neutral, batch_size)))
    return {
        "tokens": neutral.tokens,
        "perplexity": _exp(mean),
        "perplexity_ratio": _exp(mean - before),
        "nll_difference": mean - before,
        "kl": kl / neutral.tokens,
        "same_argmax": same / neutral.tokens,
    }


def _total(neutral: NeutralText, batch_size: int) -> float:
    """Add up the unedited model's NLL in the order in which a state's is."""
    return sum(exact(part.flatten()).sum().item() for part in neutral.nll.split(batch_size))


def _exp(nats: float) -> float:
    """e^x; infinite for a model so broken that a float cannot hold it."""
    return torch.tensor(nats, dtype=torch.float64).exp().item()


def _batches(model: EditableModel, ids: Tensor, scored: int, batch_size: int) -> Iterator[Batch]:
    """Yield texts as batches without padding, whose last ``scored`` tokens are answers."""
    for rows in ids.split(batch_size):
        yield model.collate([Encoded(tuple(row), scored) for row in rows.tolist()])


def _original_head(model: EditableModel) -> Callable[[Tensor], Tensor]:
    """Return the unedited model's head: normed final states [A, D] -> logits [A, vocabulary].

    An edit may have changed the head's weights, or the embeddings that they are.
    """
    head = model.model.get_output_embeddings()
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    originals = {
        own: model.edits.original(names[id(parameter)])
        for own, parameter in head.named_parameters()
        if names[id(parameter)] in model.edits.touched
    }
    return lambda states: at_least_float32(model.capped(functional_call(head, originals, states)))


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of every label, [A] nats."""
    return functional.cross_entropy(logits, labels.to(logits.device), reduction="none")


def _kl(original: Tensor, logits: Tensor) -> Tensor:
    """Return Σ_v p0 log (p0 / p) of every position, [A] nats; exactly 0 for equal logits."""
    log_p0, log_p = original.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return (log_p0.exp() * (log_p0 - log_p)).sum(dim=-1)
