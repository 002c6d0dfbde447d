"""One fact: what carries it, its edit, and what the model says. For people who look closely."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.data.texts import clean
from kmebench.editors.base import Editor, Result
from kmebench.editors.pac.impact import trace
from kmebench.editors.pac.paths import Paths, select_paths
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Text
from kmebench.errors import ConfigError
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
    """Return the probability of every next token, float32 [V].

    Raises:
        ConfigError: the prompt is no text that a model can be asked.
    """
    _check_question(model, prompt)
    return model.next_token_logits(prompt).float().softmax(dim=-1).cpu()


def likeliest(model: EditableModel, prompt: str, count: int = 5) -> list[tuple[str, float]]:
    """Return the likeliest next tokens as text with their probabilities.

    Raises:
        ConfigError: as :func:`next_token`; or ``count`` is no number of tokens.
    """
    probabilities = next_token(model, prompt)
    _check_count(count, "count", len(probabilities))
    best = probabilities.topk(count)
    tokens = [model.tokenizer.decode([i]) for i in best.indices.tolist()]
    return list(zip(tokens, best.values.tolist(), strict=True))


def says(model: EditableModel, prompt: str, tokens: int = 12) -> str:
    """Return how the model goes on (greedily), on one line.

    Raises:
        ConfigError: as :func:`next_token`; or ``tokens`` is no number of tokens.
    """
    _check_question(model, prompt)
    _check_count(tokens, "tokens")
    (asked,) = model.rewritten([Text(prompt)])
    (said,) = model.generate(model.encode_prompts([asked.prompt], room=tokens), tokens)
    return " ".join(model.tokenizer.decode(said, skip_special_tokens=True).split())


def check_editable(model: Any) -> None:
    """Refuse what is no model of this library.

    Raises:
        ConfigError: says what one is.
    """
    if not isinstance(model, EditableModel):
        raise ConfigError(f"A model is what kmebench.load returns, not a {type(model).__name__}.")


def _check_question(model: Any, prompt: Any) -> None:
    """Refuse what cannot be asked; blanks at a prompt's end stay, since tokens differ by them."""
    check_editable(model)
    try:
        clean(prompt, "the prompt")
    except ValueError as error:
        raise ConfigError(f"The model cannot be asked: {error}.") from error


def _check_count(count: Any, name: str, most: int | None = None) -> None:
    if type(count) is not int or count < 1 or (most and count > most):
        bounds = f"from 1 to {most}" if most else "from 1"
        raise ConfigError(f"{name} cannot be {count!r}: it is a whole number {bounds}.")
