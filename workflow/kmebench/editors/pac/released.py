"""PAC on the schedule of its authors' released code, without its dense machinery.

The released code trains all FFN weights with one Adam whose gradients are masked. Every second
epoch the segments are scored on the current model (``abs_zscore``, summed over all requests):
per layer and matrix the best N make up T+, the worst K τ−. Every mini-batch makes two Adam
steps: on the targets' loss with gradients outside T+ put to zero, then, on the weights as they
are by then, on λ times the loss of the unedited model's own answers with gradients outside τ−
put to zero. Moments are never reset, so a segment that was ever selected keeps moving by its
momentum, in both kinds of steps.

A segment that was never selected has zero moments and never moves. It is therefore enough to
keep masters, moments and gradients of the segments selected so far: the trajectory is that of
the dense code. The biases of the second projection, where there are any, are always trained.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.epochs import EpochEditor, adam_state, load_adam_state
from kmebench.editors.losses import check_finite
from kmebench.editors.pac.cards import PACReleasedHparams
from kmebench.editors.pac.gradients import KEY, VALUE, observed
from kmebench.editors.pac.paths import select_paths
from kmebench.editors.pac.segments import LiveSegments
from kmebench.editors.pac.zscore import released_scores
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch
from kmebench.precision import at_least_float32


class PACReleased(EpochEditor):
    """Several epochs over all requests in mini-batches, breadth first."""

    hparams: PACReleasedHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        hparams = self.hparams
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        in_order = [
            model.collate(encoded[i : i + hparams.mini_batch])
            for i in range(0, len(encoded), hparams.mini_batch)
        ]
        answers = [answer for batch in in_order for answer in _argmax(model, batch)]
        trained = _all_trained(model, hparams)
        slots = [one for each in trained for one in each.slots]
        masters = [one.masters for one in slots]
        adams = [
            torch.optim.Adam(masters, lr=hparams.learning_rate, fused=True)
            for _ in range(1 if hparams.shared_state else 2)
        ]
        try:
            done, state = self.resumed()
            if state:
                _load_state(trained, adams, state)
            for epoch in range(done, hparams.epochs):
                if epoch % hparams.rescore_every == 0:
                    with self.stopwatch("trace"):
                        _select(model, in_order, trained, hparams)
                with self.stopwatch("optimise"):
                    for chunk in torch.randperm(len(requests)).split(hparams.mini_batch):
                        batch = model.collate([encoded[i] for i in chunk])
                        own = torch.cat([answers[i] for i in chunk])
                        asked = [requests[i] for i in chunk]
                        self._step(model, batch, batch.labels, 1.0, trained, adams[0], asked)
                        if hparams.contrast > 0 and hparams.negatives > 0:
                            weight = hparams.contrast
                            self._step(model, batch, own, weight, trained, adams[-1], asked)
                self.keep(epoch + 1, lambda: _state(trained, adams))
            return WeightDelta({one.name: one.part(one.masters - one.start) for one in slots})
        finally:
            for one in slots:
                one.restore()

    def _step(
        self,
        model: EditableModel,
        batch: Batch,
        labels: Tensor,
        weight: float,
        trained: "Sequence[_Projection]",
        optimiser: torch.optim.Optimizer,
        asked: Sequence[EditRequest],
    ) -> None:
        """One Adam step of one kind; the kind decides which segments get gradients."""
        contrast = labels is not batch.labels
        by_place = {(each.layer, each.matrix): each for each in trained}
        optimiser.zero_grad(set_to_none=False)

        def receive(layer: int, matrix: int, residual: Tensor, inner: Tensor) -> None:
            residual, inner = (at_least_float32(x.flatten(0, 1)) for x in (residual, inner))
            by_place[layer, matrix].receive(residual, inner, contrast)

        if contrast and self.hparams.second_step == "momentum":
            weight = 0.0
        with observed(model, receive, range(model.n_layers)):
            loss = cross_entropy(model.answer_logits(batch), labels)
            check_finite(
                self.name,
                loss.detach().expand(len(asked)),
                asked,
                self.steps,
                learning_rate=self.hparams.learning_rate,
            )
            (weight * loss).backward()
        optimiser.step()
        for each in trained:
            for one in each.slots:
                one.write(one.masters)
        self.steps += 1


def _state(
    trained: "Sequence[_Projection]", adams: Sequence[torch.optim.Adam]
) -> dict[str, Tensor]:
    """Return the segments that were ever selected, those that are now, and the moments."""
    state: dict[str, Tensor] = {}
    for place, each in enumerate(trained):
        state |= {f"positive|{place}": each.positive, f"negative|{place}": each.negative}
    for place, one in enumerate(one for each in trained for one in each.slots):
        state |= {f"index|{place}": one.index, f"masters|{place}": one.masters}
    for place, adam in enumerate(adams):
        state |= adam_state(adam, f"adam{place}")
    return state


def _load_state(
    trained: "Sequence[_Projection]",
    adams: Sequence[torch.optim.Adam],
    state: Mapping[str, Tensor],
) -> None:
    """Go on from :func:`_state` on the unedited weights."""
    for place, each in enumerate(trained):
        device = each.segments.slot.device
        each.positive = state[f"positive|{place}"].to(device)
        each.negative = state[f"negative|{place}"].to(device)
    for place, one in enumerate(one for each in trained for one in each.slots):
        one.begin(state[f"index|{place}"].to(one.slot.device))
        one.masters.copy_(state[f"masters|{place}"])
        one.write(one.masters)
    for place, adam in enumerate(adams):
        load_adam_state(adam, f"adam{place}", state)


def _argmax(model: EditableModel, batch: Batch) -> Sequence[Tensor]:
    """Return the model's own tokens at the answer positions of every row."""
    return model.answer_logits(batch).argmax(dim=-1).split(batch.counts.tolist())


def _all_trained(model: EditableModel, hparams: PACReleasedHparams) -> "list[_Projection]":
    scorings = -(-hparams.epochs // hparams.rescore_every)
    capacity = min(scorings * (hparams.paths + hparams.negatives), model.ffn_width)
    return [
        _Projection(model, layer, matrix, capacity)
        for layer in range(model.n_layers)
        for matrix in (KEY, VALUE)
    ]


def _select(
    model: EditableModel,
    batches: Sequence[Batch],
    trained: "Sequence[_Projection]",
    hparams: PACReleasedHparams,
) -> None:
    """Score the model as it is, and train what is best and worst from now on."""
    scores = released_scores(model, batches, hparams.layers_per_pass)
    paths = select_paths(scores.unsqueeze(0), hparams.paths, hparams.negatives)
    for each in trained:
        place = 0, each.layer, each.matrix
        each.select(paths.positive[place], paths.negative[place])


class _Projection:
    """What is trained of one projection: segments, and biases where there are any."""

    def __init__(self, model: EditableModel, layer: int, matrix: int, capacity: int) -> None:
        ffn = model.ffn[layer]
        projection = ffn.key if matrix == KEY else ffn.value
        self.layer, self.matrix = layer, matrix
        offset = projection.offset
        self.segments = _Slots(model, projection.weight_name, projection.axis, capacity, offset)
        self.bias: _Slots | None = None
        if projection.bias_name is not None and matrix == KEY:
            self.bias = _Slots(model, projection.bias_name, 0, capacity, offset)
        elif projection.bias_name is not None:
            size = len(projection.module.bias)
            self.bias = _Slots(model, projection.bias_name, 0, size)
            self.bias.begin(torch.arange(size, device=self.bias.slot.device))

    @property
    def slots(self) -> "list[_Slots]":
        """Everything that is trained."""
        return [self.segments] if self.bias is None else [self.segments, self.bias]

    def select(self, positive: Tensor, negative: Tensor) -> None:
        """Train ``positive`` by the edit loss and ``negative`` by the contrastive loss."""
        device = self.segments.slot.device
        self.positive, self.negative = positive.to(device), negative.to(device)
        for slots in self.slots if self.matrix == KEY else [self.segments]:
            slots.begin(torch.cat([self.positive, self.negative]))

    def receive(self, residual: Tensor, inner: Tensor, contrast: bool) -> None:
        """Set the gradients from activations [T, D] and [T, M]; all others stay zero."""
        index = self.negative if contrast else self.positive
        self.segments.set_gradient(index, inner[:, index].T @ residual)
        if self.bias is not None and self.matrix == KEY:
            self.bias.set_gradient(index, inner[:, index].sum(dim=0))
        elif self.bias is not None:
            self.bias.set_gradient(self.bias.index, residual.sum(dim=0))


class _Slots(LiveSegments):
    """Segments with the masters and gradients [capacity, ...] that Adam trains."""

    def __init__(
        self, model: EditableModel, name: str, axis: int, capacity: int, offset: int = 0
    ) -> None:
        super().__init__(model, name, axis, capacity, offset)
        self.masters = self.start.clone()
        self.masters.grad = torch.zeros_like(self.masters)

    def begin(self, index: Tensor) -> Tensor:
        """Give slots and masters to those segments that have none yet; return these slots."""
        slots = super().begin(index)
        self.masters[slots] = self.start[slots]
        return slots

    def set_gradient(self, index: Tensor, gradient: Tensor) -> None:
        """Set the gradient of some segments."""
        self.masters.grad[self.slot[index]] = gradient
