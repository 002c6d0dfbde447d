"""The scope classifier of SERAC, trained on the development split; a cached stage.

An edit (x, y) and a question q have the similarity s = exp(−‖e(x y) − e(q)‖²). The encoder e is
fine-tuned until s is near 1 within the scope of edits and near 0 out of it.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.memory.development import alike
from kmebench.edits.sentences import TUNED, SentenceEncoder, embeddings
from kmebench.errors import ConfigError
from kmebench.io.tensors import write_tensors
from kmebench.models.editable import EditableModel

logger = logging.getLogger("kmebench")

#: Requests whose texts are compared with each other in a step; every fourth is held out.
GROUP, HELD_OUT = 12, 4
#: Steps between two looks at the requests held out; looks without a lower loss that end training.
LOOK, PATIENCE = 8, 3
#: Fewest requests: two are held out.
LEAST = 8


class Question(NamedTuple):
    """A question of a request's, and whether it is in the scope of its edit."""

    owner: EditRequest
    text: str
    in_scope: bool


def told(request: EditRequest) -> str:
    """Return an edit as a text, x y."""
    return f"{request.filled_prompt} {request.target_new}"


def questions(requests: Sequence[EditRequest]) -> list[Question]:
    """Return what is asked of requests: prompt and paraphrases in scope, locality prompts not."""
    return [
        *(Question(r, q, True) for r in requests for q in (r.filled_prompt, *r.paraphrases)),
        *(Question(r, q, False) for r in requests for q, _ in r.locality),
    ]


def scopes(requests: Sequence[EditRequest], asked: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Return which of m questions are in the scope of n edits, and which out of it; bool [n, m].

    Out of it are locality prompts, and whatever is asked of other requests. Where two requests
    share case, subject or prompt, nobody says whether it is: neither.
    """
    within = [[q.in_scope and q.owner is r for q in asked] for r in requests]
    without = [
        [not q.in_scope if q.owner is r else not alike(q.owner, r) for q in asked] for r in requests
    ]
    return torch.tensor(within), torch.tensor(without)


def balanced_loss(distances: Tensor, within: Tensor, without: Tensor) -> Tensor:
    """Return mean −log s over pairs in scope plus mean −log(1 − s) over those out of it.

    ``distances`` [n, m] are ‖e(x y) − e(q)‖² = −log s (Mitchell et al. 2022). A question that
    equals another edit word for word would have an infinite loss; it has that of the least
    distance that can be told from 0.
    """
    apart = distances[without].clamp_min(torch.finfo(distances.dtype).eps)
    return distances[within].mean() - torch.log(-torch.expm1(-apart)).mean()


def loss_of(embed: Callable[[Sequence[str]], Tensor], requests: Sequence[EditRequest]) -> Tensor:
    """Return the loss of all pairs of some requests' edits and questions."""
    asked = questions(requests)
    rows = embed([*map(told, requests), *(q.text for q in asked)])
    edits, others = rows[: len(requests)], rows[len(requests) :]
    # Neither all differences at once, nor a product, which is inexact where they are small.
    distances = torch.cdist(edits, others, compute_mode="donot_use_mm_for_euclid_dist")
    return balanced_loss(distances.square(), *scopes(requests, asked))


def train(
    path: str | Path,
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: Mapping[str, Any],
    *,
    encoder: str | Path,
) -> None:
    """Write the encoder's weights, but those of single tokens, fine-tuned on ``requests``.

    ``settings``: ``steps`` of Adam at most, and its ``learning_rate``. Of every four requests one
    is held out: the weights are those of its least loss, maybe the first. ``model``, which is to
    be edited, is not asked.

    Raises:
        ConfigError: there are too few requests.
    """
    if len(requests) < LEAST:
        raise ConfigError(
            f"classifier: trained asks for {LEAST} requests of the development split, which has "
            f"{len(requests)}; raise the data set's development."
        )
    base = SentenceEncoder.open(encoder)
    network, tokenizer = base.loaded
    held = requests[::HELD_OUT]
    learnt = [request for i, request in enumerate(requests) if i % HELD_OUT]

    def embed(texts: Sequence[str]) -> Tensor:
        return embeddings(network, tokenizer, texts)

    history = fine_tune(network, lambda group: loss_of(embed, group), learnt, held, settings)
    logger.info("loss of %d requests held out, by step: %s", len(held), history)
    facts = {
        "encoder": base.sha256,
        "learnt": [r.case_id for r in learnt],
        "held_out": [r.case_id for r in held],
        "losses": history,
    }
    write_tensors(path, _tuned(network), TUNED, facts)


def fine_tune(
    network: Any,
    loss: Callable[[Sequence[EditRequest]], Tensor],
    learnt: Sequence[EditRequest],
    held: Sequence[EditRequest],
    settings: Mapping[str, Any],
) -> dict[int, float]:
    """Train ``network`` in place on groups of ``learnt``; return the losses of ``held`` by step.

    It ends with the weights of the least of them.
    """
    network.get_input_embeddings().requires_grad_(False)
    adam = torch.optim.Adam(_tuned(network).values(), lr=settings["learning_rate"])
    history, best = {0: _unlearnt(loss, held)}, _copy(network)
    for step in range(1, settings["steps"] + 1):
        adam.zero_grad()
        loss(_drawn(learnt, step)).backward()
        adam.step()
        if step % LOOK:
            continue
        history[step] = _unlearnt(loss, held)
        least = min(history, key=lambda at: history[at])
        if least == step:
            best = _copy(network)
        elif step - least >= PATIENCE * LOOK:
            break
    network.load_state_dict(best, strict=False)
    return history


@torch.no_grad()
def _unlearnt(
    loss: Callable[[Sequence[EditRequest]], Tensor], held: Sequence[EditRequest]
) -> float:
    return float(loss(held))


def _drawn(requests: Sequence[EditRequest], step: int) -> list[EditRequest]:
    return random.Random(step).sample(requests, min(GROUP, len(requests)))


def _tuned(network: Any) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _copy(network: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _tuned(network).items()}
