"""``kmebench editors``: the cards. Needs no torch."""

import argparse

from kmebench.cli.terminal import Table, console, table
from kmebench.editors.cards import Card, card_of, registered
from kmebench.editors.needs import Pipeline
from kmebench.planning.values_page import rows

#: What an editor needs may differ between them.
_PIPELINES = (Pipeline("batch", 2), Pipeline("consecutive", 1))


def editors_command(arguments: argparse.Namespace) -> None:
    """List them, or show the values of one."""
    if arguments.name is None:
        console.print(_listed())
        return
    card = card_of(arguments.name)
    for line in (f"{card.name}: {card.summary}", f"{card.citation}.", f"Needs: {needs(card)}."):
        console.print(line)
    console.print(_values(card) if rows(card) else "It has no values.")


def _listed() -> Table:
    """One row for every editor."""
    names = ["editor", "family", "needs", "what it does", "citation"]
    shown = table("Editors", names, texts=5, fold=True)
    for card in registered().values():
        authors = card.citation.partition(",")[0]
        shown.add_row(card.name, card.family, needs(card), card.summary, authors)
    return shown


def needs(card: Card) -> str:
    """Say which cached stages an editor reads by its default values, and in which mode if not all.

    Raises:
        ConfigError: the card cannot tell.
    """
    values = card.values({})
    read = {p.mode: [n.asset for n in card.needs_of(values, p)] for p in _PIPELINES}
    found = []
    for asset in dict.fromkeys(asset for assets in read.values() for asset in assets):
        modes = [mode for mode, assets in read.items() if asset in assets]
        found.append(asset if len(modes) == len(_PIPELINES) else f"{asset} ({', '.join(modes)})")
    return ", ".join(found) or "nothing"


def _values(card: Card) -> Table:
    """One row for every hyper-parameter."""
    shown = table("Values", ["value", "default", "may be", "meaning"], texts=4, fold=True)
    shown.columns[0].no_wrap = True
    for row in rows(card):
        shown.add_row(row.name, row.default, row.allowed.replace("`", ""), row.meaning)
    return shown
