"""One fact: what carries it, its edit, and what the model says. For people who look closely."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Result
from kmebench.editors.pac.impact import trace
from kmebench.editors.pac.paths import Paths, select_paths
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Text
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


def edit_facts(model: EditableModel, editor: Editor, requests: Sequence[EditRequest]) -> Result:
    """Edit facts together, as a run that ends with them would; the model keeps the edit."""
    result = editor(model, requests)
    model.apply(result.edit)
    last = Edit.of(editor.final_edit(model))
    model.apply(last)
    return replace(result, edit=result.edit + last)


def next_token(model: EditableModel, prompt: str) -> Tensor:
    """Return the probability of every next token, float32 [V]."""
    return model.next_token_logits(prompt).float().softmax(dim=-1).cpu()


def likeliest(model: EditableModel, prompt: str, count: int = 5) -> list[tuple[str, float]]:
    """Return the likeliest next tokens as text with their probabilities."""
    best = next_token(model, prompt).topk(count)
    tokens = [model.tokenizer.decode([i]) for i in best.indices.tolist()]
    return list(zip(tokens, best.values.tolist(), strict=True))


def says(model: EditableModel, prompt: str, tokens: int = 12) -> str:
    """Return how the model goes on (greedily), on one line."""
    ((text, _),) = model.rewritten([Text(prompt)])
    (said,) = model.generate(model.encode_prompts([text], room=tokens), tokens)
    return " ".join(model.tokenizer.decode(said, skip_special_tokens=True).split())
