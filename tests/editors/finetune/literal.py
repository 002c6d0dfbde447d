"""Fine-tuning written out: torch's Adam on whole weights, one full forward pass a request."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.models.editable import EditableModel

Text = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a prompt, and of its target
Loss = Callable[[Tensor, tuple[int, ...]], Tensor]


def on_the_target(logits: Tensor, target: tuple[int, ...]) -> Tensor:
    """The mean cross-entropy of the target under teacher forcing."""
    return cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target))


def after_the_prompt(logits: Tensor, target: tuple[int, ...]) -> Tensor:
    """The mean of −log p over the target's tokens, all at the prompt's last token."""
    return -logits[-len(target) - 1].log_softmax(dim=-1)[list(target)].mean()


def fine_tuned(
    model: EditableModel,
    names: Sequence[str],
    texts: Sequence[Text],
    loss: Loss,
    groups: Callable[[], Iterable[Sequence[int]]],
    *,
    epochs: int,
    rate: float,
    tolerance: float = 0.0,
    bound: float = float("inf"),
    gates: Sequence[str] = (),
) -> tuple[dict[str, Tensor], int]:
    """The weights after all passes, and how many steps were made. ``gates``: upper halves stay."""
    start = {name: model.parameter(name).detach().clone() for name in names}
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    adam = torch.optim.Adam(weights.values(), lr=rate)
    steps = 0
    for _ in range(epochs):
        total = 0.0
        for group in groups():
            adam.zero_grad()
            mean = torch.zeros((), dtype=torch.float64)
            for prompt, target in (texts[i] for i in group):
                ids = torch.tensor([prompt + target])
                out = torch.func.functional_call(model.model, weights, kwargs={"input_ids": ids})
                mean = mean + loss(out.logits[0], target) / len(group)
            total += mean.item() * len(group)
            if mean.item() < tolerance:
                continue
            mean.backward()
            for name in gates:
                weights[name].grad[: len(weights[name]) // 2] = 0
            adam.step()
            steps += 1
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(weight.clamp(start[name] - bound, start[name] + bound))
        if total / len(texts) < tolerance:
            break
    return {name: weight.detach() for name, weight in weights.items()}, steps
