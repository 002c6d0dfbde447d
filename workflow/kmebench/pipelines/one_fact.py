"""One fact: what carries it, its edit, and what the model says. For people who look closely."""

from typing import Literal

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.pac.impact import trace
from kmebench.editors.pac.paths import Paths, select_paths
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel


def critical_shares(
    model: EditableModel, request: EditRequest, n_paths: int, score: Literal["l2", "signed_sum"]
) -> tuple[Tensor, Paths]:
    """Trace a request and select its N critical paths, disjoint.

    Returns the share of every node in all impact in the model, [L, 2, N], and the paths.
    """
    scores = getattr(trace(model, [request]), score).cpu()
    paths = select_paths(scores, n_paths, 0)
    return paths.positive_scores[0] / scores.abs().sum(), paths


def edit_fact(model: EditableModel, editor: Editor, request: EditRequest) -> WeightDelta:
    """Edit one fact as a run of one edit would; the model keeps the edit. Returns all of it."""
    delta = editor.edit(model, [request])
    model.apply(delta)
    last = editor.finish(model)
    model.apply(last)
    return delta + last


@torch.no_grad()
def next_token(model: EditableModel, prompt: str) -> Tensor:
    """Return the probability of every next token, float32 [V]."""
    ids = torch.tensor(model.encode_prompts([prompt]), device=model.device)
    return model.model(ids).logits[0, -1].float().softmax(dim=-1).cpu()


def likeliest(
    model: EditableModel, probabilities: Tensor, count: int = 5
) -> list[tuple[str, float]]:
    """Return the likeliest tokens as text with their probabilities."""
    best = probabilities.topk(count)
    tokens = [model.tokenizer.decode([i]) for i in best.indices.tolist()]
    return list(zip(tokens, best.values.tolist(), strict=True))


def says(model: EditableModel, prompt: str, tokens: int = 12) -> str:
    """Return how the model goes on (greedily), on one line."""
    ids = torch.tensor(model.encode_prompts([prompt], room=tokens), device=model.device)
    said = model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=model.pad_id,
    )
    text = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
