"""Overlays: the part of an edit that acts on texts, module outputs or logits.

Between a question and its logits an edit can act at four places, in this order: the text, the
weights, a module's output, the logits. An overlay acts at the first, third and fourth. It is a
frozen value; an edit makes a successor. Where its gate is closed it is the identity, bit by bit.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor

from kmebench.errors import KMEBenchError, ModelError

if TYPE_CHECKING:
    from kmebench.models.editable import EditableModel


Decision = TypeVar("Decision")


class Text(NamedTuple):
    """A prompt, perhaps with the target that is to be scored behind it.

    ``case_id`` names the request that asks, where one does. An overlay that rewrites a prompt
    names in ``context`` what it put before it: texts behind the same context are read together.
    """

    prompt: str
    target: str | None = None
    case_id: str | None = None
    context: str = ""


@dataclass
class Passage:
    """R texts on their way through a model.

    ``prompt_first`` and ``prompt_last`` hold each row's first and last token of the prompt, as
    columns of the batch. In the phase ``scored`` targets stand behind prompts; ``prefill`` reads
    prompts to be gone on from; ``decode`` writes one token per row. ``decisions`` keeps what a hook
    decided in the prefill, ``opened`` the rows for which one found its gate open.
    """

    prompt_last: Tensor  # [R] int64
    rows: Tensor | None = None  # [A], the row of each logit; None: one logit per row
    phase: Literal["scored", "prefill", "decode"] = "scored"
    started: bool = False
    decisions: dict[int, Any] = field(default_factory=dict)  # by id() of the overlay
    opened: Tensor | None = None  # [R] bool; None: no gate was asked
    prompt_first: Tensor | None = None  # [R] int64; None: the first column

    def prompt_columns(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's first and last column of the prompt, [R] both, where ``inputs`` lie."""
        last = self.prompt_last.to(inputs.device)
        first = torch.zeros_like(last) if self.prompt_first is None else self.prompt_first.to(last)
        return first, last

    def decided(self, overlay: "Overlay", decide: Callable[[], Decision]) -> Decision:
        """Return what ``decide`` says; while a text is written, what it said of the prompt."""
        if self.phase != "decode":
            self.decisions[id(overlay)] = decide()
        decision: Decision = self.decisions[id(overlay)]
        return decision

    def note_opened(self, rows: Tensor) -> None:
        """Note the rows, bool [R], whose gate an overlay has found open."""
        self.opened = rows if self.opened is None else self.opened | rows


#: Input [R, T, in] and output [R, T, out] of a module -> its output. Rows whose gate is closed
#: keep their bits.
Hook = Callable[[Tensor, Tensor], Tensor]


_CLASSES: dict[str, type["Overlay"]] = {}


class Overlay(ABC):
    """What an edit does besides changing weights. Subclasses are frozen dataclasses of tensors."""

    #: Registered name of the class in files; see :func:`overlay_class`.
    kind: ClassVar[str]
    #: Whether it acts on some questions alone. It opens by rewriting, or notes rows in the passage.
    gated: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class by its kind."""
        _CLASSES[cls.kind] = cls

    def rewrite(self, texts: Sequence[Text]) -> Sequence[Text]:
        """Return what is asked instead of ``texts``; the same objects where nothing changes.

        Targets are scored as they were asked for, behind the new prompts.
        """
        return texts

    def hooks(self, passage: Passage) -> Mapping[str, Hook]:
        """Return hooks on module outputs, by module path."""
        return {}

    def logits(self, passage: Passage, base: Tensor, model: "EditableModel") -> Tensor:
        """Return the logits instead of ``base`` [A, vocabulary]; ``base`` itself where closed."""
        return base

    def check(self, model: "EditableModel") -> None:  # noqa: B027
        """Refuse a model that the overlay was not made for.

        Raises:
            ModelError: so it is.
        """

    def to(self, device: torch.device) -> Self:
        """Return it with its tensors on a device; those of an edit from a file lie on the CPU."""
        own: Any = self  # a dataclass
        lying = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return cast(Self, replace(own, **{name: value.to(device) for name, value in lying.items()}))

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that make up the overlay, for files and checkpoints."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild an overlay from :meth:`tensors`.

        Raises:
            KeyError: a tensor is missing.
            ValueError: tensors do not belong together.
        """


def check_beside(model: "EditableModel", module: str, shape: Sequence[int], overlay: str) -> None:
    """Refuse a model without a linear layer at the path ``module`` whose weight has ``shape``.

    Weights may be stored either way round.

    Raises:
        ModelError: so it is; calls what the edit holds ``overlay``.
    """
    weight = getattr(dict(model.model.named_modules()).get(module), "weight", None)
    if weight is None or sorted(weight.shape) != sorted(shape):
        raise ModelError(
            f"The edit has {overlay} beside {module!r} of shape {tuple(shape)}, which this model "
            "lacks; name the model that it was made from."
        )


#: Kinds of this library, with the module that defines each.
_MODULES = {
    "codebook": "kmebench.edits.codebook",
    "side_memory": "kmebench.edits.side_memory",
    "sparse_memory": "kmebench.edits.sparse_memory",
    "text_memory": "kmebench.edits.text_memory",
}
#: Installed packages name the kinds of their overlays under this entry point group.
ENTRY_POINTS = "kmebench.overlays"


def overlay_class(kind: str) -> type[Overlay]:
    """Return the class of overlays of a kind.

    Raises:
        KMEBenchError: no installed package has one.
    """
    if kind not in _CLASSES and kind in _MODULES:
        importlib.import_module(_MODULES[kind])
    if kind not in _CLASSES:
        for point in entry_points(group=ENTRY_POINTS, name=kind):
            point.load()
    if kind not in _CLASSES:
        raise KMEBenchError(
            f"No installed package knows overlays of the kind {kind!r}; install the package of "
            "the editor that made it."
        )
    return _CLASSES[kind]
