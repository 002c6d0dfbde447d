"""The public forms of edit records: which keys each has, and how it becomes an edit request."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kmebench.data.records import SLOT, EditRequest
from kmebench.data.texts import clean, shown, word_places


class Form(NamedTuple):
    """How records of one form are read, and the keys they must have (``docs/data.md``).

    ``paper_dataset`` is the paper's data set that has this form, so that its claims about that one
    are tested on records of this form; None: on none. OpenFacts come in both forms.
    """

    read: Callable[[Mapping[str, Any], str], EditRequest]
    keys: tuple[str, ...]
    paper_dataset: str | None = None


class Twice:
    """Stands at a key that a record holds twice: nobody knows which of the values is meant."""


def parse(raw: Any, schema: str, number: int) -> EditRequest:
    """Read one record of a form of :data:`SCHEMAS`, called by its ``number`` if it has no name.

    Raises:
        ValueError: it cannot be used; names the key, or the form it looks like instead.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"it is a {type(raw).__name__}, expected an object")
    form = SCHEMAS[schema]
    if not all(_stands(raw, key) for key in form.keys) and (other := _other_form(raw, schema)):
        mend = f"set schema: {other}" if other in SCHEMAS else "rewrite it"
        raise ValueError(
            f"it looks like {other}, but schema: {schema} wants the keys {', '.join(form.keys)}; "
            f"{mend}"
        )
    named = _given(raw, "case_id")
    return form.read(raw, clean(_value(raw, "case_id"), "case_id") if named else str(number))


def _other_form(raw: Mapping[str, Any], schema: str) -> str | None:
    """Return the form, other than ``schema``, that a record looks like."""
    looks = next((name for name, holds in _LOOKS.items() if holds(raw)), None)
    return None if looks == schema else looks


# -- values ----------------------------------------------------------------------------------


def _value(raw: Mapping[str, Any], key: str) -> Any:
    """Return what stands at a key; dots lead into objects."""
    value: Any = raw
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"the key {key!r} is missing")
        value = value[part]
        if isinstance(value, Twice):
            raise ValueError(f"the key {part!r} stands in it twice")
    return value


def _optional(raw: Mapping[str, Any], key: str) -> Any:
    return _value(raw, key) if key in raw else None


def _stands(raw: Mapping[str, Any], key: str) -> bool:
    try:
        _value(raw, key)
    except ValueError:
        return False
    return True


def _text(value: Any, key: str) -> str:
    """Return a cleaned text; a list stands for it if it holds one."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"the key {key!r} holds {len(value)} texts, expected one")
        value = value[0]
    return clean(value, f"the key {key!r}")


def _text_at(raw: Mapping[str, Any], key: str) -> str:
    return _text(_value(raw, key), key)


def _answer(value: Any, key: str) -> str:
    """Return a cleaned answer: the first of a list of right ones."""
    return _text(value[:1] if isinstance(value, list) else value, key)


def _texts_at(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return one text or all of a list of them."""
    value = _value(raw, key)
    values = value if isinstance(value, list) else [value]
    return tuple(clean(text, f"the key {key!r}") for text in values)


def _list_at(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts of a list that may be missing."""
    values = _optional(raw, key) or []
    if not isinstance(values, list):
        raise ValueError(f"the key {key!r} is no list of texts")
    return tuple(clean(text, f"the key {key!r}") for text in values)


def _pairs_at(raw: Mapping[str, Any], prompts: str, answers: str) -> tuple[tuple[str, str], ...]:
    """Return every prompt with its answer: two texts, or two lists of one length.

    Beside one prompt a list holds several right answers.
    """
    asked, right = _texts_at(raw, prompts), _value(raw, answers)
    if not isinstance(_value(raw, prompts), list):
        right = [right]
    elif not isinstance(right, list):
        right = [right] if len(asked) == 1 else []
    if len(asked) != len(right):
        raise ValueError(f"the keys {prompts!r} and {answers!r} differ in length")
    return tuple((p, _answer(a, answers)) for p, a in zip(asked, right, strict=True))


def _template(text: str, subject: str) -> dict[str, Any]:
    """Put the slot where the subject stands as a whole word: ``prompt`` and ``slot``.

    Raises:
        ValueError: it stands nowhere, inside other words only, or at several places.
    """
    places = word_places(text, subject)
    if len(places) == 1:
        end = places[0] + len(subject)
        return {"prompt": text[: places[0]] + SLOT + text[end:], "slot": places[0]}
    if places:
        raise ValueError(
            f"the subject {shown(subject)} stands {len(places)} times in the prompt "
            f"{shown(text)}; only where it stands once is clear which one is meant"
        )
    why = f"the subject {shown(subject)} does not stand in the prompt {shown(text)}"
    if subject in text:
        why += " as a whole word"
    elif not (subject + text).isascii():  # letters, blanks or dashes that only look the same
        why += f": {shown(subject, ascii)} in {shown(text, ascii)}"
    raise ValueError(why)


# -- forms -----------------------------------------------------------------------------------


def _from_easyedit(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    subject = _text_at(raw, "subject")
    return EditRequest(
        case_id=case_id,
        subject=subject,
        **_template(_text_at(raw, "prompt"), subject),
        target_new=_text_at(raw, "target_new"),
        target_true=_answer(_value(raw, "ground_truth"), "ground_truth"),
        paraphrases=_texts_at(raw, "rephrase_prompt"),
        locality=_pairs_at(raw, "locality_prompt", "locality_ground_truth"),
    )


def _from_mend(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    subject = _text_at(raw, "subject")
    further = _optional(raw, "portability") or []
    portability = [
        pair
        for item in (further if isinstance(further, list) else [further])
        for pair in _pairs_at(item, "New Question", "New Answer")
    ]
    return EditRequest(
        case_id=case_id,
        subject=subject,
        **_template(_text_at(raw, "src"), subject),
        target_new=_text_at(raw, "alt"),
        target_true=_answer(_value(raw, "answers"), "answers"),
        paraphrases=_texts_at(raw, "rephrase"),
        locality=_pairs_at(raw, "loc", "loc_ans"),
        portability=tuple(portability),
    )


def _from_rome(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    true = _text_at(raw, "requested_rewrite.target_true.str")
    neighbours = _list_at(raw, "neighborhood_prompts")
    # CounterFact's neighbours share the true object; OpenFacts names each one's own.
    answers = _list_at(raw, "neighborhood_targets") or (true,) * len(neighbours)
    if len(answers) != len(neighbours):
        raise ValueError("neighborhood_targets and neighborhood_prompts differ in length")
    return EditRequest(
        case_id=case_id,
        subject=_text_at(raw, "requested_rewrite.subject"),
        prompt=_text_at(raw, "requested_rewrite.prompt"),
        target_new=_text_at(raw, "requested_rewrite.target_new.str"),
        target_true=true,
        paraphrases=_list_at(raw, "paraphrase_prompts"),
        locality=tuple(zip(neighbours, answers, strict=True)),
        relation=_optional(raw["requested_rewrite"], "relation_id") or None,
    )


def _from_wikibigedit(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    subject = _text_at(raw, "subject")
    # The release has one question in the words of a persona; its pipeline can write more.
    personas = sorted(key for key in raw if key.startswith("personas") and _given(raw, key))
    hops = ((_text_at(raw, "mhop"), _text_at(raw, "mhop_ans")),) if _given(raw, "mhop") else ()
    return EditRequest(
        case_id=case_id,
        subject=subject,
        **_template(_text_at(raw, "update"), subject),
        target_new=_text_at(raw, "ans"),
        paraphrases=tuple(_text_at(raw, key) for key in ("rephrase", *personas)),
        locality=((_text_at(raw, "loc"), _text_at(raw, "loc_ans")),),
        portability=hops,
        relation=_text_at(raw, "relation") if _given(raw, "relation") else None,
    )


def _given(raw: Mapping[str, Any], key: str) -> bool:
    """Whether anything stands at an optional key; null and NaN, as pandas writes them, do not."""
    value = _optional(raw, key)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


#: Public record forms: EasyEdit's flat one, MEND's (ZsRE), ROME's (CounterFact), WikiBigEdit's.
SCHEMAS = {
    "easyedit": Form(
        _from_easyedit,
        (
            "subject",
            "prompt",
            "target_new",
            "ground_truth",
            "rephrase_prompt",
            "locality_prompt",
            "locality_ground_truth",
        ),
        "CounterFact",
    ),
    "mend": Form(
        _from_mend, ("subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans"), "ZsRE"
    ),
    "rome": Form(
        _from_rome,
        (
            "requested_rewrite.subject",
            "requested_rewrite.prompt",
            "requested_rewrite.target_new.str",
            "requested_rewrite.target_true.str",
        ),
        "CounterFact",
    ),
    "wikibigedit": Form(
        _from_wikibigedit, ("subject", "update", "ans", "rephrase", "loc", "loc_ans")
    ),
}


def paper_dataset(schema: str) -> str | None:
    """Return which of the paper's data sets has a form; None: none."""
    form = SCHEMAS.get(schema)
    return form.paper_dataset if form else None


#: What tells the forms of public edit sets apart, those that are not read first.
_LOOKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "MQuAKE": lambda raw: isinstance(raw.get("requested_rewrite"), list),
    "KnowEdit": lambda raw: (
        "target_new" in raw
        and any(isinstance(raw.get(key), dict) for key in ("portability", "locality"))
    ),
    "RippleEdits": lambda raw: isinstance(raw.get("edit"), dict),
    "easyedit": lambda raw: {"subject", "prompt", "target_new"} <= raw.keys(),
    "mend": lambda raw: {"subject", "src", "alt"} <= raw.keys(),
    "rome": lambda raw: isinstance(raw.get("requested_rewrite"), dict),
    "wikibigedit": lambda raw: {"subject", "update", "ans"} <= raw.keys(),
}
