"""What a toolkit is to a comparison: a folder of known code that edits a copy of the model."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import Contexts
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.errors import KMEBenchError
from kmebench.models.editable import EditableModel

Batches = Sequence[Sequence[EditRequest]]  # one after another, each edited together


class Run(NamedTuple):
    """What a run of edits did to the unedited weights."""

    change: Mapping[str, Tensor]  # weight name -> change, float64
    seconds: float  # per request


@dataclass(frozen=True)
class Release:
    """Code that is known: what a folder of it holds, at one commit."""

    name: str
    commit: str
    marker: str  # a file that no other toolkit has
    code: tuple[str, ...]  # files, and folders of Python files, that are run
    digest: str  # of that code

    def files(self, folder: Path) -> Iterator[Path]:
        """Yield the files of the code in their order."""
        for name in self.code:
            place = folder / name
            yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]

    def digest_of(self, folder: Path) -> str:
        """Return the digest of a folder's code, whatever its line ends are."""
        digest = hashlib.sha256()
        for file in self.files(folder):
            content = file.read_bytes().replace(b"\r\n", b"\n") if file.is_file() else b""
            name = file.relative_to(folder).as_posix().encode()
            digest.update(b"%s\0%d\0" % (name, len(content)) + content)
        return digest.hexdigest()

    def check(self, folder: Path) -> None:
        """Refuse another commit, and code that was changed.

        Raises:
            KMEBenchError: names the commit that is wanted.
        """
        if self.digest_of(folder) != self.digest:
            raise KMEBenchError(
                f"{folder} holds {self.name}, but its code is not that of commit "
                f"{self.commit[:8]}; check it out: git -C {folder} checkout {self.commit[:8]}"
            )


class Toolkit(ABC):
    """One toolkit, open: it edits a copy of the model, never the model of this project."""

    release: ClassVar[Release]
    #: Editors of ours that it has too.
    editors: ClassVar[tuple[str, ...]]
    #: Hyper-parameters in which ours follows it, where its code leaves no choice.
    overrides: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: What was set, or taken apart, for a fair comparison.
    notes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, folder: Path, model: EditableModel, moments: Path, scratch: Path) -> None:
        self.folder, self.ours, self.moments, self.scratch = folder, model, moments, scratch
        self.model = copy.deepcopy(model.model)
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.parameters = dict(self.model.named_parameters())

    @classmethod
    @abstractmethod
    def standing_in(cls, folder: Path) -> AbstractContextManager[None]:
        """Make the toolkit's code importable inside a block."""

    @abstractmethod
    def run(self, editor: str, hparams: Any, contexts: Contexts | None, batches: Batches) -> Run:
        """Edit the unedited model with ``batches``, one after another, each edited together.

        Contexts and second moments are given; making them does not count to the seconds.
        """

    def reset(self) -> None:
        """Make the copy what the unedited model is."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.ours.parameter(name))

    def change(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return what has changed in the weights ``names`` since :meth:`reset`."""
        return {
            name: self.parameters[name].detach().double() - self.ours.parameter(name).double()
            for name in names
        }

    def layer_stats(self, _model: Any, _tokenizer: Any, layer_name: str, *_: Any, **__: Any) -> Any:
        """Stand in for the toolkits' statistics of Wikipedia: the second moments as given."""
        moment = (
            Covariances.open(self.moments).of(layer_of(layer_name)).double().to(self.model.device)
        )
        return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: moment))


def layer_of(name: str) -> int:
    """Return the layer that a module or weight of a name belongs to."""
    return int(next(part for part in name.split(".") if part.isdigit()))
