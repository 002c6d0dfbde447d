"""Edits: what an editor returns. Files are safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kmebench.edits.overlays import Overlay, overlay_class
from kmebench.edits.weights import WeightDelta
from kmebench.errors import EditError, KMEBenchError
from kmebench.io.files import atomic_path

#: Formats of files: weights alone, as version 0.1 wrote them, and with overlays.
_WEIGHTS, _WITH_OVERLAYS = "kmebench.delta.v1", "kmebench.edit.v2"
_OVERLAY = "overlay|"


@dataclass(frozen=True)
class Edit:
    """A change of weights, and overlays by name; a later overlay replaces one of its name."""

    weights: WeightDelta = field(default_factory=lambda: WeightDelta({}))
    overlays: Mapping[str, Overlay] = field(default_factory=dict)

    @classmethod
    def of(cls, edit: Union["Edit", WeightDelta]) -> "Edit":
        """Return an edit; a weight delta is one without overlays.

        Raises:
            EditError: it is neither.
        """
        if isinstance(edit, Edit):
            return edit
        if isinstance(edit, WeightDelta):
            return cls(edit)
        raise EditError(
            f"A {type(edit).__name__} is no edit: give an Edit or a WeightDelta (Edit.load reads "
            "a file)."
        )

    def __add__(self, other: "Edit") -> "Edit":
        """Return both edits as one, ``other`` being the later."""
        return Edit(self.weights + other.weights, {**self.overlays, **other.overlays})

    def __bool__(self) -> bool:
        """Say whether anything is edited."""
        return bool(self.weights or self.overlays)

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        tensors = overlay_tensors(self.overlays).values()
        return self.weights.is_finite() and all(bool(t.isfinite().all()) for t in tensors)

    def save(self, path: str | Path) -> None:
        """Write the edit as one safetensors file."""
        tensors = self.weights.tensors() | overlay_tensors(self.overlays)
        # One entry: safetensors writes several in an order that changes from file to file.
        kinds = json.dumps(overlay_kinds(self.overlays), sort_keys=True)
        metadata = {_WITH_OVERLAYS: kinds} if self.overlays else {"format": _WEIGHTS}
        kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(kept, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read an edit written by :meth:`save`.

        Raises:
            KMEBenchError: the file is no edit, or is damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as stream:
                metadata = stream.metadata() or {}
                if metadata.get("format") != _WEIGHTS and _WITH_OVERLAYS not in metadata:
                    raise KMEBenchError(f"{path} is not an edit of this program.")
                tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            weights = {k: t for k, t in tensors.items() if not k.startswith(_OVERLAY)}
            kinds = json.loads(metadata.get(_WITH_OVERLAYS, "{}"))
            return cls(WeightDelta.from_tensors(weights), overlays_from(tensors, kinds))
        except (SafetensorError, OSError) as error:
            raise KMEBenchError(f"{path} cannot be read as an edit: {error}.") from error
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise KMEBenchError(
                f"{path} is a damaged edit: a tensor is missing, or has another name or form; "
                "save it again."
            ) from error


def overlay_tensors(overlays: Mapping[str, Overlay]) -> dict[str, Tensor]:
    """Return the tensors of overlays as ``overlay|name|tensor``."""
    return {
        f"{_OVERLAY}{name}|{key}": tensor
        for name, overlay in overlays.items()
        for key, tensor in overlay.tensors().items()
    }


def overlay_kinds(overlays: Mapping[str, Overlay]) -> dict[str, str]:
    """Return the kinds of overlays by name."""
    return {name: overlay.kind for name, overlay in overlays.items()}


def overlays_from(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Overlay]:
    """Rebuild overlays from :func:`overlay_tensors` and :func:`overlay_kinds`.

    Raises:
        KeyError: a tensor is missing.
        KMEBenchError: no installed package knows a kind.
    """
    found = {}
    for name, kind in kinds.items():
        begin = f"{_OVERLAY}{name}|"
        own = {k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)}
        found[name] = overlay_class(kind).from_tensors(own)
    return found
