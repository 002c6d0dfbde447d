"""What a model is asked about a request, and which requests it can be asked."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kmebench.data.records import EditRequest
from kmebench.data.texts import shown
from kmebench.errors import ModelError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import encode, encode_prompts, joined

logger = logging.getLogger("kmebench")

#: The question-answer prompt of the WILD protocol (Yang et al. 2025).
_WILD = ("Please answer the question:\n\nQ: ", "\nA:")
#: Tokens that editors may put before the prompt of an edit (kmebench.editors.contexts).
EDIT_ROOM = 32


@dataclass(frozen=True)
class Prompt:
    """One prompt of one request, with the answer it is scored against."""

    case_id: str
    position: int  # of the request in editing order
    kind: str  # edit | paraphrase | locality | portability
    prompt: str
    target: str
    target_new: str | None  # for the probability protocol
    target_true: str | None


def prompts_of(request: EditRequest, position: int) -> list[Prompt]:
    """List the prompts of one request: edit, paraphrases, locality, portability."""

    def prompt(kind: str, text: str, target: str, new: str | None, true: str | None) -> Prompt:
        return Prompt(request.case_id, position, kind, text, target, new, true)

    new, true = request.target_new, request.target_true
    return [
        prompt("edit", request.filled_prompt, new, new, true),
        *(prompt("paraphrase", text, new, new, true) for text in request.paraphrases),
        *(prompt("locality", text, target, new, target) for text, target in request.locality),
        *(prompt("portability", text, target, None, None) for text, target in request.portability),
    ]


def wild_prompt(prompt: str) -> str:
    """Ask a prompt in the WILD manner."""
    return prompt.join(_WILD)


def askable(
    model: EditableModel,
    requests: Sequence[EditRequest],
    wild_max_tokens: int,
    on_bad_record: str,
) -> list[EditRequest]:
    """Leave out the requests that ``model`` cannot be asked (``"skip"``), or refuse them.

    Which they are depends on tokenizer and context alone, so every stage finds the same.

    Raises:
        ModelError: a request cannot be asked (``"error"``), or none can; names it and says why.
    """
    kept = []
    for request in requests:
        if reason := unspelled(model, request) or too_long(model, request, wild_max_tokens):
            problem = f"Request {request.case_id!r} cannot be asked: {reason}"
            if on_bad_record == "error":
                raise ModelError(
                    f"{problem}; mend it, or set on_bad_record: skip for its data set."
                )
            logger.warning("left out: %s", problem)
        else:
            kept.append(request)
    if not kept:
        raise ModelError(f"{problem}, and none of the others can be asked; choose another model.")
    return kept


def unspelled(model: EditableModel, request: EditRequest) -> str | None:
    """Say which target the tokenizer spells by its token for the unknown, if it does.

    All targets that it does not know would be the same tokens, and an edit between them nothing.
    """
    unknown = model.tokenizer.unk_token_id
    scored = [(p.prompt, p.target) for p in prompts_of(request, 0) if p.kind != "locality"]
    if unknown is None:
        return None
    encoded = encode(model.tokenizer, scored)
    missing = [t for (_, t), e in zip(scored, encoded, strict=True) if unknown in e.target_ids]
    return f"the tokenizer does not know all of the target {shown(missing[0])}" if missing else None


def too_long(model: EditableModel, request: EditRequest, wild_max_tokens: int) -> str | None:
    """Say why a request does not fit into the model's context, if it does not.

    Behind every prompt must be room for its targets, and, asked in the WILD manner, for
    ``wild_max_tokens``; beside the prompt of the edit for :data:`EDIT_ROOM`.
    """
    if model.context is None:
        return None
    prompts = prompts_of(request, 0)
    texts = [
        (p.prompt, joined(p.prompt, target), EDIT_ROOM if p.kind == "edit" else 0)
        for p in prompts
        for target in (p.target, p.target_new, p.target_true)
        if target is not None
    ]
    texts += [(p.prompt, wild_prompt(p.prompt), wild_max_tokens) for p in prompts]
    ids = encode_prompts(model.tokenizer, [text for _, text, _ in texts])
    needed = [len(x) + room for x, (_, _, room) in zip(ids, texts, strict=True)]
    tokens = max(needed)
    if tokens <= model.context:
        return None
    prompt = texts[needed.index(tokens)][0]
    return (
        f"with what is put around it the prompt {shown(prompt)} has {tokens} tokens, more than "
        f"{model.limit}"
    )
