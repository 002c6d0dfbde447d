"""Edit requests: the one record every stage reads."""

from dataclasses import dataclass, field

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
