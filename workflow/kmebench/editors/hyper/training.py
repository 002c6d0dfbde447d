"""Training of a hyper-network as a cached stage, resumable.

    L = c_e · NLL(y* | x'; W + ΔW) + KL(p_W ‖ p_{W+ΔW})

for edits (x, y*), their paraphrases x' and texts that are to stay as they are. What the network
reads, h and g, does not depend on its weights φ. So with A = ∂L/∂W at the edited weights

    ∂L/∂φ = ∂/∂φ Σ ⟨A, ΔW⟩,   A held fixed,

exactly: one backward pass of the language model for A, one of the network. Neither A nor ΔW is
formed: A = G'ᵀ H' by the rows of the edited model, and ΔW = u v.
"""

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from kmebench.data.records import EditRequest
from kmebench.editors.epochs import adam_state, load_adam_state
from kmebench.editors.hyper.base import HyperEditor, every_place, factors_of, total
from kmebench.editors.hyper.cards import trained_values
from kmebench.editors.rows import Rows, rows_of
from kmebench.errors import ConfigError, EditError, KMEBenchError
from kmebench.io.files import write_json
from kmebench.io.logs import track
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch, Pair, length_sorted_chunks
from kmebench.precision import promoted
from kmebench.preemption import PreemptedError

logger = logging.getLogger("kmebench")

_PARTIAL = "kmebench.hypernetwork.partial.v1"
#: Saved states on the way.
_SAVES = 10


class Example(NamedTuple):
    """An edit to learn from."""

    request: EditRequest
    paraphrase: Pair
    locality: Pair


class Losses(NamedTuple):
    """Means over the edits of a step."""

    edit: float  # NLL of the paraphrases' targets, nats per token
    locality: float  # KL to the unedited model, nats per token


def examples(usable: Sequence[EditRequest], count: int, seed: int, step: int) -> list[Example]:
    """Draw the edits of a step, none of them twice, with a paraphrase and a locality text each."""
    draw = random.Random(f"{seed} {step}")
    drawn = draw.sample(usable, count)
    return [
        Example(each, (draw.choice(each.paraphrases), each.target_new), draw.choice(each.locality))
        for each in drawn
    ]


class Training:
    """A network under way: its weights, Adam, and the losses so far."""

    def __init__(
        self,
        editor: HyperEditor,
        model: EditableModel,
        usable: Sequence[EditRequest],
        partial: Path,
        identity: Mapping[str, Any],
        micro_batch: int,
    ) -> None:
        self.editor, self.model, self.usable, self.partial = editor, model, usable, partial
        self.micro_batch = micro_batch
        self.hparams, self.sites = editor.hparams, editor.sites(model)
        self.identity = json.dumps(identity, sort_keys=True)
        network = editor.network([site.shape for site in self.sites], self.hparams)
        self.network = network.to(model.device, promoted(model.model.dtype))
        own = network.step_sizes
        rest = [parameter for parameter in network.parameters() if parameter is not own]
        self.adam = torch.optim.Adam(
            [{"params": rest}, {"params": [own], "lr": self.hparams.step_size_rate}],
            lr=self.hparams.learning_rate,
        )
        self.losses: list[Losses] = []

    def run(self, stopped_by: Callable[[], str | None]) -> Iterator[None]:
        """Take the steps that are left; yield after each.

        Raises:
            EditError: a loss or gradient is not finite.
            PreemptedError: a signal came; what is done is saved.
        """
        self._restore()
        steps = self.hparams.steps
        for step in range(len(self.losses), steps):
            self.losses.append(self.step(step))
            yield
            signal, done = stopped_by(), step + 1
            if done < steps and (signal or done % -(-steps // _SAVES) == 0):
                self._save()
            if done < steps and signal:
                raise PreemptedError(
                    f"Stopped by {signal} after {done} of {steps} steps, which are saved in "
                    f"{self.partial}: the same command goes on from there."
                )

    def step(self, step: int) -> Losses:
        """Learn from some edits once; return their losses before that."""
        h = self.hparams
        drawn = examples(self.usable, h.edits * h.groups, h.seed, step)
        requests = [each.request for each in drawn]
        seen = self.editor.traced(self.model, self.sites, requests, self.micro_batch)
        self.network.learn_moments([Rows.joint(parts) for parts in zip(*seen, strict=True)])
        states = self._states([each.locality for each in drawn])
        self.adam.zero_grad()
        means = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(drawn), h.edits):
            own = slice(start, start + h.edits)
            losses = self.learn(drawn[own], seen[own], states[own])
            means += losses.mean(dim=1).cpu().double() / h.groups
        norm = clip_grad_norm_(self.network.parameters(), h.clip)
        if not (norm.isfinite() and means.isfinite().all()):
            raise EditError(
                f"{self.editor.name}: training became NaN or infinite at step {step}; lower "
                f"learning_rate (now {h.learning_rate:g}) or step_size (now {h.step_size:g})."
            )
        self.adam.step()
        return Losses(*means.tolist())

    def learn(
        self,
        drawn: Sequence[Example],
        seen: Sequence[Sequence[Rows]],
        states: Sequence[Tensor],
    ) -> Tensor:
        """Add the gradient of the mean loss of edits made by one change; return all, [2, n]."""
        with torch.enable_grad():
            factors = factors_of(self.network, seen)
        with self.model.edits.savepoint():
            self.model.apply(total(self.sites, factors))
            losses, after = self.after(drawn, states)
        with torch.enable_grad():
            for (u, v), rows in zip(factors, after, strict=True):
                product = (rows.gradients.to(u) @ u) * (rows.inputs.to(v) @ v.T)
                (product.sum() / self.hparams.groups).backward()
        return losses

    def after(
        self, drawn: Sequence[Example], states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Rows]]:
        """Ask the edited model; return the losses, [2, n], and rows whose Gᵀ H is ∂L/∂W."""
        parts = []
        for start in range(0, len(drawn), self.micro_batch):
            own = slice(start, start + self.micro_batch)
            parts.append(self._asked(drawn[own], states[own], len(drawn)))
        losses, rows = zip(*parts, strict=True)
        return torch.cat(losses, dim=1), [Rows.joint(each) for each in zip(*rows, strict=True)]

    def _asked(
        self, drawn: Sequence[Example], states: Sequence[Tensor], size: int
    ) -> tuple[Tensor, list[Rows]]:
        """Return the same for some of ``size`` edits, of one pass forward and back."""
        said = self.model.encode([each.paraphrase for each in drawn])
        kept = map(self.editor.kept, self.model.encode([each.locality for each in drawn]))
        batch = self.model.collate([*said, *kept])
        found: list[Tensor] = []

        def loss() -> Tensor:
            losses = text_losses(self.model, batch, torch.cat(list(states)))
            found.append(losses.detach())
            return (self.hparams.edit_weight * losses[0].sum() + losses[1].sum()) / size

        lowest = min(self.hparams.layers)
        rows = rows_of(self.model, self.sites, lowest, every_place(batch), loss)
        return found[0], rows

    @torch.no_grad()
    def _states(self, texts: Sequence[Pair]) -> list[Tensor]:
        """Return the final states of the unedited model where texts are to stay, [A, D] each."""
        encoded = [self.editor.kept(each) for each in self.model.encode(texts)]
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for chunk in length_sorted_chunks([len(e.ids) for e in encoded], self.micro_batch):
            batch = self.model.collate([encoded[i] for i in chunk])
            states = self.model.final_states(batch).split(batch.counts.tolist())
            for index, own in zip(chunk, states, strict=True):
                found[index] = own
        return found

    def _save(self) -> None:
        facts = {"identity": self.identity, "losses": self.losses}
        tensors = self.network.tensors() | adam_state(self.adam, "adam")
        write_tensors(self.partial, tensors, _PARTIAL, facts)

    def _restore(self) -> None:
        """Go on from a saved state; one that is damaged, or of another training, is left."""
        if not self.partial.is_file():
            return
        try:
            file = TensorFile.open(self.partial, _PARTIAL)
            tensors = {name: file.tensor(name) for name in file.digests}
        except KMEBenchError as error:
            logger.info("starting afresh: %s", error)
            return
        if file.facts["identity"] != self.identity:
            logger.info("%s is of another training: starting afresh", self.partial)
            return
        self.network.load_tensors(tensors)
        load_adam_state(self.adam, "adam", tensors)
        self.losses = [Losses(*each) for each in file.facts["losses"]]
        logger.info("resumed after %d steps", len(self.losses))


def text_losses(model: EditableModel, batch: Batch, states: Tensor) -> Tensor:
    """Return the loss of each of n targets, and the KL of each of n texts behind them, [2, n].

    Means over the answer positions of a text, in nats. ``states`` [A, D] are the final states of
    the unedited model at the positions of the n texts that are to stay.
    """
    logits, size = model.answer_logits(batch), len(batch.counts) // 2
    targets = len(logits) - len(states)
    nll = cross_entropy(logits[:targets], batch.labels[:targets], reduction="none")
    before, after = (x.log_softmax(dim=-1) for x in (model.head(states), logits[targets:]))
    divergence = (before.exp() * (before - after)).sum(dim=-1)
    tokens = torch.cat([nll, divergence])
    sums = tokens.new_zeros(2 * size).index_add(0, batch.rows, tokens)
    return (sums / batch.counts).view(2, size)


def train(
    path: str | Path,
    history: str | Path,
    model: EditableModel,
    requests: Sequence[EditRequest],
    editor: HyperEditor,
    *,
    code: Mapping[str, str],
    stopped_by: Callable[[], str | None] = lambda: None,
) -> None:
    """Train the network of an editor, write it to ``path`` and its losses to ``history``.

    Goes on from the state of a killed training, saved every tenth of the way; ``code``
    (file -> digest) belongs to its identity. Of ``requests`` those with a paraphrase and a locality
    prompt are learnt from.

    Raises:
        ConfigError: there are fewer of them than a step takes.
        EditError: a loss is not finite.
        NoMemoryError: half of ``micro_batch`` texts at once do not fit.
        PreemptedError: a signal came (``stopped_by`` names it).
    """
    usable = [request for request in requests if request.paraphrases and request.locality]
    h, partial, started = editor.hparams, Path(f"{path}.partial"), time.perf_counter()
    if len(usable) < h.edits * h.groups:
        raise ConfigError(
            f"{editor.name}: a step of training takes {h.edits * h.groups} records (edits times "
            f"groups), and the training split has {len(usable)} with a paraphrase and a locality "
            "prompt; raise the data set's training, or lower edits or groups."
        )
    identity = {
        "settings": trained_values(h),
        "requests": hashlib.sha256(repr(usable).encode()).hexdigest(),
        "weights": [float(site.projection.weight.float().sum()) for site in editor.sites(model)],
        "code": dict(code),
    }

    def trained(micro_batch: int) -> Training:
        training = Training(editor, model, usable, partial, identity, micro_batch)
        for _ in track(training.run(stopped_by), "steps of training", h.steps):
            pass
        return training

    mend = "lower edits, or choose a smaller dtype"
    training = halved_if_needed(trained, h.micro_batch, f"training {editor.name}", mend)
    training.network.save(path, h, len(usable))
    losses = [each._asdict() for each in training.losses]
    seconds = time.perf_counter() - started
    write_json(history, {"records": len(usable), "seconds": seconds, "losses": losses})
    partial.unlink(missing_ok=True)
