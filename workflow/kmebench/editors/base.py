"""What an editor is, and how one is built from the config."""

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.cards import Card, card_of
from kmebench.edits.edit import Edit
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError, EditError
from kmebench.models.editable import EditableModel

#: Files of cached stages, by the name of what they hold (:attr:`Need.asset`).
Assets = Mapping[str, Path]
#: Told the number of epochs done, after each.
AfterEpoch = Callable[[int], None]


class Stopwatch:
    """Seconds spent by name: ``trace``, ``optimise``, ``solve``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``; waits for the GPU."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add time measured elsewhere (a cached stage)."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Result:
    """What a call of an editor returned, and what it took."""

    edit: Edit
    steps: int  # of optimisation
    seconds: Mapping[str, float]  # by name: see Stopwatch


class Editor(ABC):
    """A function from edit requests to an edit.

    Editors are built from their hyper-parameters and from the files of cached stages. They are
    called; subclasses implement :meth:`edit`, where they count ``self.steps``, time by
    ``self.stopwatch`` and pass at most ``self.micro_batch`` requests through the model at once.
    These are of one call, and for the subclass alone: a caller has arguments and the result.
    """

    #: As the card has it; begins the editor's messages.
    name = ""
    #: An instance of the card's class of them, which subclasses name here.
    hparams: Any

    def __init__(self, hparams: Any, assets: Assets) -> None:
        self.hparams, self.assets = hparams, assets
        self._begin()
        self.load_state_dict({})

    def __call__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        micro_batch: int | None = None,
        after_epoch: AfterEpoch | None = None,
    ) -> Result:
        """Edit ``requests`` together; leaves the model as it was, and by an error the editor too.

        ``micro_batch`` goes before the hyper-parameter of that name. ``after_epoch`` is for
        editors whose state can be saved then (:class:`kmebench.editors.epochs.EpochEditor`).

        Raises:
            EditError: a request cannot be edited, or its edit is not finite; names the case_id.
        """
        self._begin(micro_batch, after_epoch)
        memory = self.state_dict()
        try:
            edit = Edit.of(self.edit(model, requests))
            if not edit.is_finite():
                raise EditError(
                    f"The edit of {named(requests)} holds NaN or infinite values; lower the "
                    "learning rate."
                )
        except Exception as error:
            self.load_state_dict(memory)
            if isinstance(error, torch.linalg.LinAlgError):  # a singular matrix, or one with NaN
                raise EditError(
                    f"The equations of the edit of {named(requests)} have no solution ({error}); "
                    "the model may be damaged by the edits before."
                ) from error
            raise
        return self.result(edit)

    def _begin(self, micro_batch: int | None = None, after_epoch: AfterEpoch | None = None) -> None:
        self.stopwatch, self.steps = Stopwatch(), 0
        self.micro_batch, self.after_epoch = micro_batch or self.whole_micro_batch, after_epoch

    @property
    def whole_micro_batch(self) -> int:
        """The hyper-parameter ``micro_batch``: of a call that is not told another."""
        return getattr(self.hparams, "micro_batch", 1)

    def result(self, edit: Edit) -> Result:
        """Return an edit with what the last call took, which it did even if it failed."""
        return Result(edit, self.steps, self.stopwatch.seconds)

    @abstractmethod
    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> Edit | WeightDelta:
        """Return what edits ``requests`` together; leaves the model as it was."""

    def final_edit(self, model: EditableModel) -> Edit | WeightDelta:
        """Return what is still to be added when a run ends here (nothing, for most).

        ``model`` carries all edits of the run; called before every evaluation of a run's end.
        """
        return WeightDelta({})

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the editor remembers between calls (nothing, for most).

        Later edits replace these tensors; they never change them in place.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore :meth:`state_dict`; an empty state forgets everything (for most, nothing)."""


def named(requests: Sequence[EditRequest]) -> str:
    """Say which requests are edited together: the first, and how many."""
    return f"request {requests[0].case_id!r} (batch of {len(requests)})"


def check_layers(editor: str, layers: tuple[int, ...], model: EditableModel) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ConfigError: names the editor and the layers there are.
    """
    if not layers or any(not 0 <= layer < model.n_layers for layer in layers):
        raise ConfigError(
            f"{editor}: layers {list(layers)} are not all among the model's 0 to "
            f"{model.n_layers - 1}; set its layers for this model."
        )


def build_editor(name: str, hparams: Mapping[str, Any], assets: Mapping[str, str | Path]) -> Editor:
    """Build an editor from its config name, its hyper-parameters and its cached stages.

    Raises:
        ConfigError: no such editor, a hyper-parameter it does not have, or a wrong value of one;
            or its class is none of an editor.
    """
    card = card_of(name)
    values = card.values(hparams)
    files = {key: Path(path) for key, path in assets.items()}
    editor: Editor = _class_of(card, values, files)(values, files)
    editor.name = card.name
    return editor


def _class_of(card: Card, *arguments: Any) -> type[Editor]:
    """Return an editor's class; refuse what cannot be called with ``arguments``, or cannot edit."""
    found = card.load()
    wrong = ""
    if not (isinstance(found, type) and issubclass(found, Editor)):
        wrong = "is no class derived from kmebench.editors.base.Editor"
    elif inspect.isabstract(found):
        wrong = "has no method edit(model, requests)"
    else:
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError:
            wrong = "is not built from (hparams, assets)"
    if wrong:
        raise ConfigError(
            f"The editor {card.name!r} cannot be built: {card.implementation} {wrong}."
        )
    return found
