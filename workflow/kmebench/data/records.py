"""Edit requests: the one record every stage reads."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kmebench.data.texts import clean, shown
from kmebench.io.checked_files import set_aside, trusted
from kmebench.io.files import write_text

#: Where the subject stands in :attr:`EditRequest.prompt`.
SLOT = "{}"

_Pairs = tuple[tuple[str, str], ...]  # (prompt, target) of each


@dataclass(frozen=True)
class EditRequest:
    """One fact to edit.

    ``prompt`` is a template: the subject stands where it holds :data:`SLOT`, from the index
    ``slot`` on. ``slot`` may be left out if the prompt holds only one; braces elsewhere are text.
    Every other prompt is filled text. All texts are cleaned on the way in
    (:func:`kmebench.data.texts.clean`). A target is joined to its prompt by one space
    (``docs/methods.md``).

    Raises:
        ValueError: no editor could use the request; names the field.
    """

    case_id: str
    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: _Pairs = ()
    portability: _Pairs = ()
    relation: str | None = None
    slot: int | None = None

    def __post_init__(self) -> None:
        """Clean the texts, find the slot."""
        for name in ("case_id", "subject", "target_new"):
            self._set(name, clean(getattr(self, name), name))
        for name in ("target_true", "relation"):
            if getattr(self, name) is not None:
                self._set(name, clean(getattr(self, name), name))
        texts = _items(self.paraphrases, "paraphrases")
        self._set("paraphrases", tuple(clean(text, "a paraphrase") for text in texts))
        for name in ("locality", "portability"):
            items = _items(getattr(self, name), name)
            self._set(name, tuple(_pair(item, name) for item in items))
        prompt = clean(self.prompt, "prompt")
        # The slot moves by what is cleaned before it.
        until_slot = self.prompt[: slot_of(self.prompt, self.slot)] + SLOT
        self._set("slot", len(clean(until_slot, "prompt")) - len(SLOT))
        self._set("prompt", prompt)
        if not unicodedata.is_normalized("NFC", self.filled_prompt):
            raise ValueError(
                f"prompt {shown(prompt)} adds a mark to a letter of the subject; write the "
                "subject with it"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def asked_of(self, subject: str) -> str:
        """Return the prompt with any subject in its slot."""
        slot = slot_of(self.prompt, self.slot)
        return self.prompt[:slot] + subject + self.prompt[slot + len(SLOT) :]

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in its slot."""
        return self.asked_of(self.subject)


def slot_of(prompt: str, slot: int | None) -> int:
    """Return where the slot of a prompt begins.

    Raises:
        ValueError: there is none, or more than one and nobody says which.
    """
    if slot is None:
        if (count := prompt.count(SLOT)) != 1:
            held = f"{SLOT} {count} times, expected once" if count else f"no {SLOT}"
            raise ValueError(f"prompt {shown(prompt)} holds {held} for the subject")
        return prompt.index(SLOT)
    if slot < 0 or not prompt.startswith(SLOT, slot):
        raise ValueError(f"prompt {shown(prompt)} holds no {SLOT} at slot {slot}")
    return slot


def _items(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a list")
    return value


def _pair(item: Any, name: str) -> tuple[str, str]:
    if len(_items(item, f"an item of {name}")) != 2:
        raise ValueError(f"an item of {name} is no pair of prompt and target")
    return clean(item[0], f"a {name} prompt"), clean(item[1], f"a target of {name}")


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be used: its index in the file, its case_id, and why."""

    index: int
    case_id: str
    reason: str


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
            requests.append(EditRequest(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise set_aside(path, f"line {number} is no edit request: {error}") from error
    return requests
