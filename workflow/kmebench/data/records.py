"""Edit requests: the one record every stage reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kmebench.errors import DataError
from kmebench.files import write_text
from kmebench.reading import set_aside, trusted

#: Where the subject stands in :attr:`EditRequest.prompt`.
SLOT = "{}"


@dataclass(frozen=True)
class EditRequest:
    """One fact to edit.

    ``prompt`` is a template holding :data:`SLOT` once, for the subject; every other prompt
    is filled text. Texts carry no leading or trailing blanks; a target is joined to its
    prompt by one space (``docs/methods.md``).
    """

    case_id: str
    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[tuple[str, str], ...] = field(default=())  # (prompt, target)
    portability: tuple[tuple[str, str], ...] = field(default=())  # (prompt, target)
    relation: str | None = None

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in its slot."""
        return self.prompt.replace(SLOT, self.subject, 1)

    def __post_init__(self) -> None:
        """Refuse a request that no editor could use; the message names the field."""
        for name in ("case_id", "subject", "prompt", "target_new"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if SLOT not in self.prompt:
            raise ValueError(f"prompt holds no {SLOT} for the subject")
        if any(not text for text in self.paraphrases):
            raise ValueError("a paraphrase is empty")
        for name in ("locality", "portability"):
            if any(not prompt or not target for prompt, target in getattr(self, name)):
                raise ValueError(f"a {name} prompt or its target is empty")


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be used: its index in the file, its case_id, and why."""

    index: int
    case_id: str
    reason: str


def read_records(
    path: str | Path, schema: str, on_bad_record: str = "error"
) -> tuple[list[tuple[int, EditRequest]], list[BadRecord]]:
    """Read a public edit set: a JSON list of records in one of :data:`SCHEMAS`.

    Returns the usable records with their index in the file, and the bad ones
    (``on_bad_record="skip"``).

    Raises:
        DataError: the file is no such list, or (``"error"``) a record is bad; names file,
            index, case_id and key.
    """
    records, bad, seen = [], [], set()
    for index, raw in enumerate(_read_list(path)):
        case_id = str(raw.get("case_id", index)) if isinstance(raw, dict) else str(index)
        try:
            request = _parse(raw, schema, case_id)
            if request.case_id in seen:
                raise ValueError("its case_id stands in the file twice")
            seen.add(request.case_id)
            records.append((index, request))
        except ValueError as error:
            bad.append(BadRecord(index, case_id, str(error)))
            if on_bad_record == "error":
                raise DataError(
                    f"{path}: record {index} (case_id {case_id}) cannot be used: {error}; mend "
                    "the file, or set on_bad_record: skip for this data set."
                ) from error
    return records, bad


def _read_list(path: str | Path) -> list[Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}); it may be truncated: delete it and fetch it again."
        ) from error
    if not isinstance(data, list):
        raise DataError(f"{path} holds a {type(data).__name__}, expected a list of records.")
    return data


def _parse(raw: Any, schema: str, case_id: str) -> EditRequest:
    if not isinstance(raw, dict):
        raise ValueError(f"it is a {type(raw).__name__}, expected an object")
    return SCHEMAS[schema](raw, case_id)


def _text(raw: Mapping[str, Any], *keys: str) -> str:
    """Return a stripped text at a nested key; the first item where a list stands for one."""
    value: Any = raw
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"the key {'.'.join(keys)!r} is missing")
        value = value[key]
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"the key {'.'.join(keys)!r} holds no text")
    if not value.strip():
        raise ValueError(f"the key {'.'.join(keys)!r} is empty")
    return value.strip()


def _template(text: str, subject: str) -> str:
    """Put the slot where the subject first stands."""
    if subject not in text:
        raise ValueError(f"the subject {subject!r} does not stand in the prompt {text!r}")
    return text.replace(subject, SLOT, 1)


def _texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = raw.get(key) or []
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"the key {key!r} is no list of texts")
    return tuple(v.strip() for v in values)


def _from_easyedit(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    subject = _text(raw, "subject")
    locality = ((_text(raw, "locality_prompt"), _text(raw, "locality_ground_truth")),)
    return EditRequest(
        case_id=case_id,
        subject=subject,
        prompt=_template(_text(raw, "prompt"), subject),
        target_new=_text(raw, "target_new"),
        target_true=_text(raw, "ground_truth"),
        paraphrases=(_text(raw, "rephrase_prompt"),),
        locality=locality,
    )


def _from_mend(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    subject = _text(raw, "subject")
    further = raw.get("portability")
    portability = (
        ((_text(further, "New Question"), _text(further, "New Answer")),) if further else ()
    )
    return EditRequest(
        case_id=case_id,
        subject=subject,
        prompt=_template(_text(raw, "src"), subject),
        target_new=_text(raw, "alt"),
        target_true=_text(raw, "answers"),
        paraphrases=(_text(raw, "rephrase"),),
        locality=((_text(raw, "loc"), _text(raw, "loc_ans")),),
        portability=portability,
    )


def _from_rome(raw: Mapping[str, Any], case_id: str) -> EditRequest:
    prompt = _text(raw, "requested_rewrite", "prompt")
    true = _text(raw, "requested_rewrite", "target_true", "str")
    neighbours = _texts(raw, "neighborhood_prompts")
    # CounterFact's neighbours share the true object; OpenFacts names each one's own.
    answers = _texts(raw, "neighborhood_targets") or (true,) * len(neighbours)
    if len(answers) != len(neighbours):
        raise ValueError("neighborhood_targets and neighborhood_prompts differ in length")
    return EditRequest(
        case_id=case_id,
        subject=_text(raw, "requested_rewrite", "subject"),
        prompt=prompt,
        target_new=_text(raw, "requested_rewrite", "target_new", "str"),
        target_true=true,
        paraphrases=_texts(raw, "paraphrase_prompts"),
        locality=tuple(zip(neighbours, answers, strict=True)),
        relation=raw["requested_rewrite"].get("relation_id"),
    )


#: Public record forms: EasyEdit's flat one, MEND's (ZsRE), ROME's (CounterFact).
SCHEMAS = {"easyedit": _from_easyedit, "mend": _from_mend, "rome": _from_rome}


def write_requests(path: str | Path, requests: Sequence[EditRequest]) -> None:
    """Write requests as JSON lines."""
    lines = [json.dumps(asdict(request), ensure_ascii=False) for request in requests]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_requests(path: str | Path) -> list[EditRequest]:
    """Read what :func:`write_requests` wrote.

    Raises:
        DamagedFileError: a line is damaged or cut off; names file and line.
    """
    requests = []
    # Not splitlines(): texts may hold line separators other than the newline.
    with trusted(path):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    if lines.pop():
        raise set_aside(path, f"line {len(lines) + 1} is cut off")
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line)
            for name in ("paraphrases", "locality", "portability"):
                raw[name] = tuple(tuple(x) if isinstance(x, list) else x for x in raw[name])
            requests.append(EditRequest(**raw))
        except (ValueError, TypeError, KeyError) as error:
            raise set_aside(path, f"line {number} is no edit request: {error}") from error
    return requests
