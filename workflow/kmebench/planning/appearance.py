"""The colour and marker of every editor: the same in each figure and on the page. No torch.

The colour tells an editor's family, the marker tells the editor within it.
"""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

from kmebench.editors.cards import Card, registered

#: One colour a family. Blue, vermilion, green and purple are Okabe's and Ito's (2008); with brown,
#: violet, olive and grey they differ for every kind of colour vision, and show on white and black
#: paper.
FAMILIES = {
    "control": "#767676",
    "finetune": "#009E73",
    "gradient": "#A06CD5",
    "hyper": "#799D55",
    "kn": "#8C564B",
    "locate": "#0072B2",
    "memory": "#CC79A7",
    "pac": "#D55E00",
}
#: Colours of families that packages bring: wine and indigo of Paul Tol's muted scheme.
_MORE = ("#882255", "#332288")
#: Matplotlib's markers, the most different first.
MARKERS = "osD^vPX*<>hpd8H"


class Style(NamedTuple):
    """How an editor looks."""

    colour: str  # #rrggbb
    marker: str  # one of MARKERS


def styles(methods: Mapping[str, Card]) -> dict[str, Style]:
    """Return the style of every method from its editor's card.

    Registered editors come first whether a config has them or not, so theirs never change.
    Further rows of a config (an editor with other values) follow in its order.
    """
    families: dict[str, list[str]] = {}
    for name, card in chain(registered().items(), methods.items()):
        members = families.setdefault(card.family, [])
        if name not in members:
            members.append(name)
    unknown = [family for family in families if family not in FAMILIES]
    colours = FAMILIES | {family: _MORE[k % len(_MORE)] for k, family in enumerate(unknown)}
    found = {}
    for name, card in methods.items():
        place = families[card.family].index(name)
        found[name] = Style(colours[card.family], MARKERS[place % len(MARKERS)])
    return found
