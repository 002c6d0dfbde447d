"""From all records of a data set to those that are edited, and those held out.

Two splits are held out: one to tune on (development), one to train hyper-networks on (training).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kmebench.data.records import BadRecord, EditRequest
from kmebench.data.texts import word_places
from kmebench.errors import DataError

Indexed = tuple[int, EditRequest]  # (index in the source file, request)

#: Two questions about one subject overlap if they share this much of their telling words
#: (Jaccard index).
OVERLAP = 1 / 3
_WORD = re.compile(r"\w+")
#: Words that say nothing about which relation is asked for.
_FUNCTION_WORDS = frozenset(
    """
    a an and are as at be been by did do does for from had has have he her his how in into is it
    its name of on or she s that the their they this to was were what when where which who whom
    whose will with
    """.split()  # noqa: SIM905 - a list of words reads best as one
)


@dataclass(frozen=True)
class Selection:
    """Which records to take; see ``datasets`` in the config schema."""

    n: int | None = None
    seed: int | None = None
    segments: tuple[tuple[int, int], ...] | None = None
    development: int = 0
    training: int = 0
    conflicts: str = "keep"


@dataclass(frozen=True)
class Prepared:
    """The reported split, those held out, and what happened on the way."""

    requests: list[EditRequest]
    development: list[EditRequest]
    training: list[EditRequest]
    report: dict[str, Any]


def prepare(
    records: Sequence[Indexed],
    bad: Sequence[BadRecord],
    selection: Selection,
    left_out: Sequence[EditRequest] = (),
) -> Prepared:
    """Select the records to edit and hold out a development and a training split.

    Before anything is selected, what shares subject or prompt with a request of ``left_out`` goes;
    with ``conflicts="drop"``, every record that contradicts an earlier one of the source too.

    Raises:
        DataError: there are not enough records.
    """
    places = [*(index for index, _ in records), *(item.index for item in bad)]
    length = max(places, default=-1) + 1
    records = _apart_from(left_out, records)
    found = conflicts([request for _, request in records])
    dropped: set[str] = set()
    if selection.conflicts == "drop":
        dropped = {case_id for group in found for case_id in group["case_ids"][1:]}
        records = [(i, r) for i, r in records if r.case_id not in dropped]
    chosen = _select(records, selection, length)
    development = _hold_out(records, chosen, "development", selection)
    training = _hold_out(records, chosen + development, "training", selection)
    mine = {request.case_id for request in chosen}
    report = {
        "usable": len(records) + len(dropped),
        "bad_records": [asdict(record) for record in bad],
        "dropped_for_conflicts": sorted(dropped),
        "selected": len(chosen),
        "development": len(development),
        "training": len(training),
        "conflicts_among_selected": [
            group for group in found if len(mine & set(group["case_ids"])) > 1
        ],
        "locality_edited_elsewhere": edited_elsewhere(chosen),
    }
    return Prepared(chosen, development, training, report)


def _select(records: Sequence[Indexed], selection: Selection, length: int) -> list[EditRequest]:
    """Return the reported requests; ``length`` counts all records of the file, bad ones too."""
    if selection.segments is not None:
        for start, stop in selection.segments:
            if not start < stop <= length:
                raise DataError(f"The segment [{start}, {stop}] lies outside the {length} records.")
        wanted = [range(start, stop) for start, stop in selection.segments]
        chosen = [r for index, r in records if any(index in segment for segment in wanted)]
        if not chosen:
            raise DataError(
                f"segments of this data set hold none of its {len(records)} usable records; name "
                "others, or mend the records of its file."
            )
        return chosen
    n = len(records) if selection.n is None else selection.n
    if n > len(records):
        raise DataError(
            f"n is {n}, but there are {len(records)} usable records; lower n of this data set, or "
            "mend the records of its file."
        )
    if selection.seed is None:
        return [request for _, request in records[:n]]
    picks = sorted(random.Random(selection.seed).sample(range(len(records)), n))
    return [records[pick][1] for pick in picks]


def _hold_out(
    records: Sequence[Indexed], taken: Sequence[EditRequest], split: str, selection: Selection
) -> list[EditRequest]:
    """Sample the records of a split, which share neither subject nor prompt with those taken."""
    free = [request for _, request in _apart_from(taken, records)]
    asked: int = getattr(selection, split)
    if asked > len(free):
        raise DataError(
            f"{split} is {asked}, but only {len(free)} records share no subject with the reported "
            "ones and those held out before; lower it."
        )
    picks = random.Random(selection.seed or 0).sample(range(len(free)), asked)
    return [free[pick] for pick in sorted(picks)]


def _apart_from(others: Sequence[EditRequest], records: Sequence[Indexed]) -> list[Indexed]:
    """Return the records that share neither subject nor prompt with any of ``others``."""
    subjects = {r.subject.casefold() for r in others}
    prompts = {r.filled_prompt.casefold() for r in others}
    return [
        (index, request)
        for index, request in records
        if request.subject.casefold() not in subjects
        and request.filled_prompt.casefold() not in prompts
    ]


def edited_elsewhere(requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Find locality prompts that another of the requests edits (case aside).

    Once that is made, the unedited model's answer is not what they ought to have. Returns count,
    and prompts: case_id of who asks it, prompt, and the case_ids in edited_by.
    """
    editors: dict[str, list[str]] = {}
    for request in requests:
        editors.setdefault(request.filled_prompt.casefold(), []).append(request.case_id)
    found = []
    for request in requests:
        for prompt, _ in request.locality:
            others = [c for c in editors.get(prompt.casefold(), []) if c != request.case_id]
            if others:
                found.append({"case_id": request.case_id, "prompt": prompt, "edited_by": others})
    return {"count": len(found), "prompts": found}


def conflicts(requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """Find records that contradict each other.

    Requests of one subject whose questions overlap - directly or through a third - form a
    group; a group with more than one target (case aside) is a conflict. Two requests overlap
    if any prompt or paraphrase of one shares at least :data:`OVERLAP` of its telling words
    (subject and function words aside) with any of the other. Returns subject, case_ids and
    targets of every conflict, in the order of the source.
    """
    by_subject: dict[str, list[EditRequest]] = {}
    for request in requests:
        by_subject.setdefault(request.subject.casefold(), []).append(request)
    groups = [group for same in by_subject.values() for group in _overlapping(same)]
    return [
        {
            "subject": group[0].subject,
            "case_ids": [r.case_id for r in group],
            "targets": [r.target_new for r in group],
        }
        for group in groups
        if len({r.target_new.casefold() for r in group}) > 1
    ]


def _overlapping(requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
    """Split requests of one subject into groups connected by overlapping questions."""
    asked = [_questions(request) for request in requests]
    group_of = list(range(len(requests)))
    for b in range(len(requests)):
        for a in range(b):
            if any(_overlap(x, y) >= OVERLAP for x in asked[a] for y in asked[b]):
                old, new = group_of[b], group_of[a]
                group_of = [new if group == old else group for group in group_of]
    groups = [[r for r, g in zip(requests, group_of, strict=True) if g == k] for k in set(group_of)]
    return sorted(groups, key=lambda group: requests.index(group[0]))


def _questions(request: EditRequest) -> list[frozenset[str]]:
    """Return the telling words of every way the request asks.

    Words are cut to six letters, where "manufacturer" and "manufactured" meet.
    """
    texts = [request.asked_of(" ")]
    texts += [_without(text, request.subject) for text in request.paraphrases]
    words = [frozenset(_WORD.findall(text.casefold())) for text in texts]
    return [frozenset(w[:6] for w in found - _FUNCTION_WORDS or found) for found in words]


def _without(text: str, subject: str) -> str:
    """Put a blank where the subject stands as a whole word."""
    for place in reversed(word_places(text, subject)):
        text = f"{text[:place]} {text[place + len(subject) :]}"
    return text


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
