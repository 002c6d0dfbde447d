"""What a reader must know of each kind of figure. Imports no torch."""

from collections.abc import Iterable

_INTERVALS = "bars are 95% intervals over edits"
#: How to read a figure, by its kind in the config.
_READ = {
    "overview": "One mark per editor, coloured by family; its area is Generality. Dashed: the "
    f"unedited model; {_INTERVALS}",
    "cost": f"Colours are families of editors. Dashed: the unedited model; {_INTERVALS}",
    "time": f"Mean over calls of the editor; {_INTERVALS}",
    "nodes": "Share of each critical node in the impact of T+, mean over records; bars are 95% "
    "bootstrap intervals over records",
    "layers": "One row per record, sorted by the layer in which half of the impact has come "
    "together. Above: the mean over records",
    "sweep": f"Metrics on the final model; {_INTERVALS}",
    "edits": "A point after k edits is of those k edits, or of the newest; grey: too few to "
    "compare editors; "
    f"{_INTERVALS}",
    "edit-layers": "One row per edit, sorted by the layer in which half of its squared norm has "
    "come together. Above: the mean over edits",
    "norms": "Frobenius norm of an edit in each layer, median over calls of the editor",
    "sizes": "Grey: the editor of the best Score among the others, with its name; hollow: the "
    f"paper's numbers. Filled: ours; {_INTERVALS}",
    "paper": "On the diagonal both numbers are equal; bars are 95% intervals of ours",
}
#: Kinds that show metrics, which are of one protocol.
_SCORED = ("overview", "cost", "sweep", "edits")


def caption(
    title: str,
    kind: str,
    protocol: str,
    n: Iterable[int],
    turns: Iterable[int] = (),
    *,
    paper: bool = False,
) -> str:
    """Return the caption of a figure.

    ``n``: how many edits its cells hold; ``turns``: how many are made together; ``paper``: whether
    the paper's numbers are marked along the edits.
    """
    counts = sorted(set(n))
    said = [title, _READ[kind]]
    if paper:
        said.append("Hollow: the paper's numbers, mean and range over its models")
    if counts:
        scored = f"Protocol {protocol}, " if kind in _SCORED else ""
        cells = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        said.append(f"{scored}{cells} edits per cell")
    said += [f"Edits in turns of {turn}" for turn in sorted({*turns} - {1})]
    return ". ".join(said) + "."
