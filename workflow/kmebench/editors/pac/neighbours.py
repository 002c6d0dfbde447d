"""Neighbours of a fact: the same prompt about other subjects."""

from kmebench.data.records import EditRequest
from kmebench.models.encoding import SubjectText

#: Subjects of several kinds: one more than may be asked for, in case an edit is of one of them.
SUBJECTS = (
    "Albert Einstein",
    "Paris",
    "Toyota",
    "Japan",
    "The Beatles",
    "Mount Everest",
    "Harvard University",
    "Titanic",
    "Cleopatra",
    "Microsoft",
    "The Nile",
    "Mozart",
    "Madrid",
)


def neighbours(request: EditRequest, n: int) -> list[SubjectText]:
    """Return the prompt of ``request``, with its target, about the first ``n`` other subjects."""
    own = request.subject.casefold()
    others = [subject for subject in SUBJECTS if subject.casefold() != own]
    text = SubjectText.of(request, "", request.target_new)
    return [text._replace(subject=subject) for subject in others[:n]]
