"""What editors may take from records of the development split."""

from kmebench.data.records import EditRequest


def alike(one: EditRequest, other: EditRequest) -> bool:
    """Whether two requests share case, subject or prompt."""
    return (
        one.case_id == other.case_id
        or one.subject == other.subject
        or one.filled_prompt == other.filled_prompt
    )
