"""One edit as tables: the next tokens, what the model says, and what changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

from kmebench.cli.terminal import Table, table
from kmebench.evaluation.answers import begins_with, natural_stop, normalise

#: Columns of a bar of probability 1.
_BAR = 14
Verdict = Literal["written", "not written", "same", "changed"]
_STYLES: dict[Verdict, str] = {
    "written": "bold green",
    "not written": "bold red",
    "same": "dim",
    "changed": "bold yellow",
}


@dataclass(frozen=True)
class Look:
    """What a model says at one moment."""

    tokens: Sequence[tuple[str, float]]  # the likeliest next of the edited prompt
    answers: Sequence[str]  # to the edited prompt, then to its neighbours


def next_tokens(prompt: str, target: str, before: Look, after: Look) -> Table:
    """The likeliest next tokens side by side; those that begin the target stand out."""
    shown = table(f"Next token of “{prompt}”", ["before", "", "", "after", "", ""])
    for column in (1, 3, 4):
        shown.columns[column].justify = "left"
    for old, new in zip(before.tokens, after.tokens, strict=True):
        shown.add_row(*_token(*old, target), *_token(*new, target))
    return shown


def _token(token: str, probability: float, target: str) -> tuple[Text, Text, Text]:
    """A token, its bar and its probability."""
    begins = bool(token.strip()) and target.startswith(token.strip())
    style = _STYLES["written"] if begins else ""
    bar = "█" * round(_BAR * probability)
    return Text(repr(token), style), Text(bar.ljust(_BAR), style), Text(f"{probability:.1%}", style)


def verdicts(target: str, before: Sequence[str], after: Sequence[str]) -> list[Verdict]:
    """Whether the edited prompt goes on by the target, and which neighbours changed.

    Answers are compared up to their natural stop, as by the protocol `wild`.
    """
    written = begins_with(natural_stop(after[0], target), target)
    first: Verdict = "written" if written else "not written"
    pairs = zip(before[1:], after[1:], strict=True)
    rest: list[Verdict] = ["same" if _answer(a) == _answer(b) else "changed" for a, b in pairs]
    return [first, *rest]


def _answer(text: str) -> str:
    return normalise(natural_stop(text))


def answers(prompts: Sequence[str], before: Look, after: Look, found: Sequence[Verdict]) -> Table:
    """What the model says to the edited prompt, and below it to the neighbours."""
    names = ["prompt", "before", "after", ""]
    shown = table("What the model says", names, texts=4, fold=True)
    shown.columns[3].no_wrap = True
    rows = zip(prompts, before.answers, after.answers, found, strict=True)
    for place, (prompt, old, new, verdict) in enumerate(rows):
        style = _STYLES[verdict]
        shown.add_row(Text(prompt), Text(old), Text(new, style), Text(verdict, style))
        if place == 0:
            shown.add_section()
    return shown


def summary(found: Sequence[Verdict]) -> str:
    """One sentence."""
    neighbours = found[1:]
    said = f"The fact is {found[0]}"
    if not neighbours:
        return (
            f"{said}; OpenFacts knows no neighbours of this subject, so name some by --neighbour."
        )
    return f"{said}; {neighbours.count('changed')} of {len(neighbours)} neighbours changed."
