"""How a run's folder and settings spell its pipeline, with the size of a turn. Imports no torch.

A *turn* is a group of requests that consecutive editing hands over together, without rollback.
Turns of one request are the pipeline ``consecutive`` itself; of more, ``consecutive+turn=50``.
"""

from kmebench.values import JOIN, read_all, spell_all

#: The variant of a run whose hyper-parameters are the configured ones.
DEFAULT = "default"


def spell_mode(pipeline: str, turn: int) -> str:
    """Spell a pipeline with turns of so many requests."""
    return pipeline if turn == 1 else JOIN.join([pipeline, spell_all({"turn": turn})])


def split_mode(mode: str) -> tuple[str, int]:
    """Return the pipeline of a mode, and the requests of a turn."""
    pipeline, _, values = mode.partition(JOIN)
    return pipeline, int(read_all(values).get("turn", 1))


def in_turns(mode: str) -> str:
    """Return what captions say of turns behind the pipeline's name; nothing of turns of one."""
    _, turn = split_mode(mode)
    return "" if turn == 1 else f" in turns of {turn}"
