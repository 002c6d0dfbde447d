"""``kmebench completion``: the static script of a shell, written by shtab. Needs no torch."""

import argparse

import shtab

from kmebench.cli.parser import parser
from kmebench.editors.cards import registered
from kmebench.planning.by_hand import DEVICES
from kmebench.planning.grid import BYTES

#: By what stands in the help for a value: the files that a shell offers.
_FILES = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY}
#: By option: the words that a shell offers. Others are taken too.
_WORDS = {"device": DEVICES, "dtype": BYTES}


def completion_command(arguments: argparse.Namespace) -> None:
    """Print the script."""
    made = parser()
    (commands,) = (a for a in made._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            _complete(action)
    print(shtab.complete(made, arguments.shell))


def _complete(action: argparse.Action) -> None:
    """Tell shtab what a value may be."""
    words = {**_WORDS, "method": registered(), "name": registered()}
    if action.metavar in _FILES:
        action.complete = _FILES[action.metavar]  # type: ignore[attr-defined]
    elif action.dest == "model":
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest in words:
        action.choices = list(words[action.dest])
