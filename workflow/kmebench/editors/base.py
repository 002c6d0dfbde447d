"""What an editor is, and how one is built from the config."""

import dataclasses
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.registry import editor_target
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError
from kmebench.models.editable import EditableModel


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


class Editor(ABC):
    """A function from edit requests to a weight delta.

    Subclasses are built from their ``Hparams`` (a frozen dataclass: the documentation of what
    can be varied) and from the files of cached stages. ``stopwatch`` and ``steps`` are filled
    by :meth:`edit` and reset by the session that calls it.
    """

    Hparams: ClassVar[type]

    def __init__(self, hparams: Any, assets: Mapping[str, Path]) -> None:
        self.hparams = hparams
        self.assets = assets
        self.stopwatch = Stopwatch()
        self.steps = 0

    @abstractmethod
    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Return the delta that edits ``requests`` together; leaves the model as it was.

        Raises:
            EditError: a request cannot be edited; names editor and case_id.
        """

    def finish(self, model: EditableModel) -> WeightDelta:
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


def build_editor(name: str, hparams: Mapping[str, Any], assets: Mapping[str, str | Path]) -> Editor:
    """Build an editor from its config name, its hyper-parameters and its cached stages.

    Raises:
        ConfigError: no such editor, a hyper-parameter it does not have, or a value of another
            type than the editor declares (numbers written as text, as YAML reads ``1e-4``, are
            taken as numbers).
    """
    # Only here: an editor that is built by its class needs no pydantic.
    from pydantic import TypeAdapter, ValidationError

    module, class_name = editor_target(name)
    try:
        editor_class = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The editor {name!r} cannot be imported: {error}") from error
    fields = {
        field.name.rstrip("_"): field.name for field in dataclasses.fields(editor_class.Hparams)
    }
    unknown = sorted(set(hparams) - set(fields))
    if unknown:
        raise ConfigError(
            f"The editor {name!r} has no hyper-parameter {unknown[0]!r}; "
            f"it has {', '.join(fields)}."
        )
    try:
        values = TypeAdapter(editor_class.Hparams).validate_python(
            {fields[key]: value for key, value in hparams.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"The editor {name!r}: hyper-parameter {str(first['loc'][0]).rstrip('_')} cannot be "
            f"{first['input']!r}: {first['msg']}."
        ) from error
    return editor_class(values, {key: Path(path) for key, path in assets.items()})


def resolved(editor: Editor) -> dict[str, Any]:
    """Return all hyper-parameters of an editor under their config names."""
    return {key.rstrip("_"): value for key, value in dataclasses.asdict(editor.hparams).items()}
