"""Adam on some parameters, over passes of mini-batches: what all of fine-tuning shares.

    minimise the mean loss of the targets over the trained parameters

Editors say which parameters they train. They may have a loss of their own, other groups of
requests for a step, and another rule for when a group is learnt: then it is not stepped on. A
pass whose requests together are learnt is the last.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from kmebench.data.records import EditRequest
from kmebench.editors.epochs import EpochEditor, adam_state, load_adam_state
from kmebench.editors.losses import check_finite, target_losses
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.models.layouts import Projection


@dataclass(frozen=True)
class Trained:
    """A parameter; its first ``offset`` entries along ``axis``, a gate, stay as they are."""

    parameter: nn.Parameter
    axis: int = 0
    offset: int = 0

    @classmethod
    def by_name(cls, projections: Sequence[Projection]) -> dict[str, Self]:
        """Return the weights of projections, without a gate in the same module."""
        return {p.weight_name: cls(p.weight, p.axis, p.offset) for p in projections}


class FineTuning(EpochEditor):
    """Adam on the parameters of :meth:`trained`."""

    @abstractmethod
    def trained(self, model: EditableModel) -> dict[str, Trained]:
        """Return what is trained, by parameter name.

        Raises:
            ConfigError: the model has no such layer.
        """

    def learnt(self, losses: Tensor) -> bool:
        """Whether requests with these losses, [n], need no step: by their mean."""
        return float(losses.mean()) < self.hparams.tolerance

    def groups(self, n_requests: int) -> Sequence[Sequence[int]]:
        """Split the requests of a pass into those of one step each: at random."""
        return [g.tolist() for g in torch.randperm(n_requests).split(self.hparams.mini_batch)]

    def encode(self, model: EditableModel, requests: Sequence[EditRequest]) -> list[Encoded]:
        """Return the tokens of every prompt with its target."""
        return model.encode([(r.filled_prompt, r.target_new) for r in requests])

    def losses(self, model: EditableModel, encoded: Sequence[Encoded]) -> Tensor:
        """Return the loss of each request, [R], in nats per token, with its graph."""
        return target_losses(model, encoded)

    def centers(self, model: EditableModel, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the centres of the boxes that weights may not leave; none: unconstrained.

        ``start`` are the masters before this edit. Half a box is ``norm_constraint`` wide.
        """
        return {}

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        encoded = self.encode(model, requests)
        trained = self.trained(model)
        start = {name: model.edits.master(name) for name in trained}
        try:
            tuned = self._tune(model, requests, encoded, trained, start)
            return WeightDelta({name: Dense(tuned[name] - start[name]) for name in trained})
        finally:
            for name, each in trained.items():
                parameter = each.parameter.requires_grad_(False)
                parameter.grad = None
                parameter.copy_(start[name])  # the live weight is the rounded master

    def _tune(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        trained: Mapping[str, Trained],
        start: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the tuned masters; in float32 they are the live weights themselves."""
        live = {name: each.parameter.requires_grad_() for name, each in trained.items()}
        masters = {
            name: p.detach() if p.dtype == start[name].dtype else start[name].clone()
            for name, p in live.items()
        }
        optimiser = torch.optim.Adam(masters.values(), lr=self.hparams.learning_rate, fused=True)
        centers = self.centers(model, start)
        done, state = self.resumed()
        load_adam_state(optimiser, "adam", state)
        for name, master in masters.items() if state else ():
            master.copy_(state[name])
            live[name].detach().copy_(master)
        for epoch in range(done, self.hparams.steps):
            seen = []
            with self.stopwatch("optimise"):
                for group in self.groups(len(requests)):
                    seen.append(self._backward(model, requests, encoded, group))
                    if not self.learnt(seen[-1]):
                        self._step(optimiser, trained, masters, centers)
                        continue
                    for parameter in live.values():
                        parameter.grad = None
            if self.learnt(torch.cat(seen)):
                break
            self.keep(epoch + 1, lambda: masters | adam_state(optimiser, "adam"))
        return masters

    def _backward(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        group: Sequence[int],
    ) -> Tensor:
        """Accumulate the gradient of the group's mean loss; return the loss of each, [n].

        Of a group that turns out to be learnt, the gradient is not complete.
        """
        seen: list[Tensor] = []
        lengths = [len(encoded[i].ids) for i in group]
        chunks = [
            [group[i] for i in chunk] for chunk in length_sorted_chunks(lengths, self.micro_batch)
        ]
        for chunk in chunks:
            losses = self.losses(model, [encoded[i] for i in chunk])
            asked = [requests[i] for i in chunk]
            rate = self.hparams.learning_rate
            check_finite(self.name, losses.detach(), asked, self.steps, learning_rate=rate)
            seen.append(losses.detach())
            if chunk is chunks[-1] and self.learnt(torch.cat(seen)):
                break
            (losses.sum() / len(group)).backward()
        return torch.cat(seen)

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        trained: Mapping[str, Trained],
        masters: dict[str, Tensor],
        centers: dict[str, Tensor],
    ) -> None:
        """Move the masters by the gradients of the live weights, which follow them."""
        for name, master in masters.items():
            each = trained[name]
            master.grad = each.parameter.grad.to(master.dtype)
            master.grad.narrow(each.axis, 0, each.offset).zero_()
            each.parameter.grad = None
        optimiser.step()
        self._project(masters, centers)
        for name, master in masters.items():
            master.grad = None
            trained[name].parameter.detach().copy_(master)
        self.steps += 1

    def _project(self, masters: dict[str, Tensor], centers: dict[str, Tensor]) -> None:
        """Clamp every master into its box."""
        for name, center in centers.items():
            bound, middle = self.hparams.norm_constraint, center.to(masters[name].dtype)
            masters[name].clamp_(min=middle - bound, max=middle + bound)
