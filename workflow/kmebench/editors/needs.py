"""What editors need of cached stages. Imports no torch.

A need names its rule and spells its file; a rule reads the settings of its job back from the
name. An editor finds the file under ``assets[need.key]``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, cast

from kmebench.errors import ConfigError
from kmebench.values import DEVELOPMENT, JOIN, read_all, spell_all

#: Tokens for each of the M dimensions of C. Where all its eigenvalues are equal, those of an
#: estimate spread over (1 ± √(M / tokens))² times that: from 0.25 to 2.25 with four.
TOKENS_PER_DIMENSION = 4

#: Paths that share nothing, or the best of all.
Selection = Literal["disjoint", "kbest"]
#: What runs of every editor read; the other inputs are files of cached stages, by their keys.
EVERY_RUN = ("model", "requests", "original", "neutral", "code")
#: Bytes of a file's name that file systems take.
LONGEST = 255
#: Of them, what comes to a name that values make: endings, marks of files under way.
_MARKS = 40
_VALUE = re.compile(r"([^+.=]+)=([^+]*)")


@dataclass(frozen=True)
class Pipeline:
    """How requests reach an editor: ``batch_size`` at a time in batches, else ``turn``."""

    mode: str
    batch_size: int
    turn: int = 1


class Need(ABC):
    """One file of a cached stage; ``asset`` says what it holds."""

    asset: ClassVar[str]
    rule: ClassVar[str]

    @property
    def key(self) -> str:
        """Name of the file among the assets of an editor."""
        return self.asset

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """Layers whose covariance, or what is computed of it, the file holds."""
        return ()

    @abstractmethod
    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""


@dataclass(frozen=True)
class Paths(Need):
    """Transmission paths, selected from cached scores for ``group`` requests at a time."""

    score: str
    group: int
    selection: Selection
    paths: int
    negatives: int

    asset: ClassVar[str] = "paths"
    rule: ClassVar[str] = "select_paths"
    form: ClassVar[str] = "kmebench.paths.v2"  # what the file's header calls it

    @property
    def name(self) -> str:
        """Name of the file, e.g. ``l2+edit+disjoint+paths=15+negatives=1``."""
        scope = "edit" if self.group == 1 else f"batch={self.group}"
        counts = spell_all({"paths": self.paths, "negatives": self.negatives})
        return JOIN.join([self.score, scope, self.selection, counts])

    @classmethod
    def parse(cls, name: str) -> "Paths":
        """Read a name back."""
        score, scope, selection, *counts = name.split(JOIN)
        group = int(scope.partition("=")[2] or 1)
        return cls(score, group, cast(Selection, selection), **read_all(JOIN.join(counts)))

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""
        return f"trace/{model}/{dataset}/paths/{self.name}.safetensors"


@dataclass(frozen=True)
class Covariance(Need):
    """C = E[k kᵀ] of the inputs of W2; one file holds all layers that a model's runs need."""

    layers: tuple[int, ...]

    asset: ClassVar[str] = "covariance"
    rule: ClassVar[str] = "covariance"
    form: ClassVar[str] = "kmebench.moments.v2"  # what the file's header calls it

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """All of them."""
        return self.layers

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""
        return f"covariance/{model}.safetensors"


def few_tokens(tokens: int, width: int) -> str | None:
    """Say so if C [M, M], M = ``width``, is estimated from few tokens; None if it is not."""
    enough = TOKENS_PER_DIMENSION * width
    if tokens >= enough:
        return None
    return (
        f"{tokens} tokens estimate the covariance of keys of width {width} poorly, above all where "
        f"it is small and edits write; set covariance.tokens to {enough} or more."
    )


@dataclass(frozen=True)
class _OfCovariance(Need):
    """What is computed of C of one layer: a file of its own, since it takes minutes."""

    layer: int

    rule: ClassVar[str] = "factorise_covariance"

    @property
    def key(self) -> str:
        """Name of the file among the assets of an editor, e.g. ``inverse5``."""
        return f"{self.asset}{self.layer}"

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """The one."""
        return (self.layer,)

    @property
    def factor(self) -> str:
        """Name of the folder, e.g. ``inverse`` or ``inverse+damping=0.003``."""
        return self.asset

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""
        return f"covariance/{model}/{self.factor}/{self.layer}.safetensors"


@dataclass(frozen=True)
class Inverse(_OfCovariance):
    """(C + ε m I)⁻¹ of one layer, with m the mean eigenvalue of C."""

    damping: float = 0.0  # ε

    asset: ClassVar[str] = "inverse"

    @property
    def factor(self) -> str:
        """Name of the folder; only with damping another."""
        damped = spell_all({"damping": self.damping})
        return JOIN.join([self.asset, damped]) if self.damping else self.asset


@dataclass(frozen=True)
class Spectrum(_OfCovariance):
    """Eigenvalues and eigenvectors of C of one layer."""

    asset: ClassVar[str] = "spectrum"


@dataclass(frozen=True)
class NeutralMetric(Need):
    """Moments of the FFN matrices of some layers over ``tokens`` of text that the model writes."""

    layers: tuple[int, ...]
    tokens: int
    seed: int = 0

    asset: ClassVar[str] = "neutral_metric"
    rule: ClassVar[str] = "neutral_metric"
    form: ClassVar[str] = "kmebench.neutral_metric.v1"  # what the file's header calls it

    @property
    def name(self) -> str:
        """Name of the file, e.g. ``layers=4:5+tokens=12288+seed=0``."""
        return spell_all(asdict(self))

    @classmethod
    def parse(cls, name: str) -> "NeutralMetric":
        """Read a name back."""
        values = read_all(name)
        return cls(**values | {"layers": tuple(values["layers"])})

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""
        return f"metric/{model}/{self.name}.safetensors"


@dataclass(frozen=True)
class Targets(Need):
    """Targets z* of all requests on the unedited model, by layer and loss."""

    site: str
    layer: int
    steps: int
    learning_rate: float
    kl_factor: float
    weight_decay: float
    clamp_factor: float
    kl_position: str
    stop_loss: float
    said_steps: int | None = None

    asset: ClassVar[str] = "targets"
    rule: ClassVar[str] = "optimise_targets"

    @property
    def name(self) -> str:
        """Name of the file, e.g. ``site=layer+layer=8+steps=25+learning_rate=0.5+...``."""
        return spell_all({name: x for name, x in asdict(self).items() if x is not None})

    @classmethod
    def parse(cls, name: str) -> "Targets":
        """Read a name back."""
        return cls(**read_all(name))

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results."""
        return f"targets/{model}/{dataset}/{self.name}.safetensors"


@dataclass(frozen=True)
class Trained(Need):
    """What an editor has learnt from the development split, once for all runs of a model.

    ``function`` ("module:function") is called as ``function(path, model, requests, settings)``
    with the unedited model and the development requests, and writes the file. If it
    ``reads_encoder``, it is given the folder of the sentence encoder too, as ``encoder=folder``.
    """

    function: str
    settings: Mapping[str, Any] = field(hash=False)
    reads_encoder: bool = False

    asset: ClassVar[str] = "trained"
    rule: ClassVar[str] = "train_stage"

    @property
    def name(self) -> str:
        """Name of the file: module, function and settings."""
        flag = {"reads_encoder": True} if self.reads_encoder else {}
        values = spell_all({**flag, **self.settings})
        return JOIN.join(filter(None, [self.function.replace(":", "."), values]))

    @classmethod
    def parse(cls, name: str) -> "Trained":
        """Read a name back."""
        function, _, settings = name.partition(JOIN)
        module, _, attribute = function.rpartition(".")
        values = read_all(settings)
        flag = values.pop("reads_encoder", False)
        return cls(f"{module}:{attribute}", values, flag)

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results: a tuning run reads the same as a report."""
        return f"trained/{model}/{dataset.removesuffix(DEVELOPMENT)}/{self.name}.safetensors"


@dataclass(frozen=True)
class Hypernetwork(Need):
    """The network of an editor, trained on the training split with these hyper-parameters."""

    editor: str
    settings: Mapping[str, Any] = field(hash=False)

    asset: ClassVar[str] = "hypernetwork"
    rule: ClassVar[str] = "hypernetwork"

    @property
    def name(self) -> str:
        """Name of the file, e.g. ``value_layers=28:29+...+steps=200+...+seed=0``."""
        return spell_all(self.settings)

    @property
    def records(self) -> int:
        """How many records of the training split a step takes."""
        return int(self.settings["edits"] * self.settings["groups"])

    @classmethod
    def parse(cls, editor: str, name: str) -> "Hypernetwork":
        """Read a name back."""
        return cls(editor, read_all(name))

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results: a tuning run reads the same as a report."""
        folder = f"hypernetwork/{model}/{dataset.removesuffix(DEVELOPMENT)}/{self.editor}"
        return f"{folder}/{self.name}.safetensors"


@dataclass(frozen=True)
class Encoder(Need):
    """The folder of the sentence encoder, one for all models (``encoder`` in the config)."""

    asset: ClassVar[str] = "encoder"
    rule: ClassVar[str] = "fetch_encoder"

    def path(self, model: str, dataset: str) -> str:
        """Return where the folder lies below the results."""
        return "encoder"


@dataclass(frozen=True)
class Development(Need):
    """The records of the development split themselves."""

    asset: ClassVar[str] = "development"
    rule: ClassVar[str] = "prepare_dataset"

    def path(self, model: str, dataset: str) -> str:
        """Return where the file lies below the results: a tuning run reads its own data set."""
        return f"data/{dataset.removesuffix(DEVELOPMENT)}{DEVELOPMENT}.jsonl"


def check_names(editor: str, needs: Sequence[Need]) -> None:
    """Refuse needs of an editor whose files could not be called so, or told from other inputs.

    Raises:
        ConfigError: a name is too long (:func:`check_length`), or a key has a file already.
    """
    for number, need in enumerate(needs):
        if need.key in (*EVERY_RUN, *(other.key for other in needs[:number])):
            raise ConfigError(
                f"The editor {editor!r} needs a file under the key {need.key!r}, under which its "
                "runs read another; give the need another key or asset."
            )
        for part in PurePosixPath(need.path("", "")).with_suffix("").parts:
            check_length(part, editor, LONGEST - _MARKS)


def check_length(name: str, editor: str, most: int = LONGEST) -> None:
    """Refuse a file's name that file systems do not take.

    Raises:
        ConfigError: it has more bytes than ``most``; names the value that takes most of them.
    """
    size = len(name.encode())
    if size > most:
        values = dict(_VALUE.findall(name)) or {"the names of the model and the data set": name}
        key = max(values, key=lambda key: len(values[key]))
        raise ConfigError(
            f"The values of the editor {editor!r} make a file name of {size} bytes, more than "
            f"{most}; shorten {key}."
        )


_NEEDS = (
    *(Paths, Covariance, Inverse, NeutralMetric, Targets),
    *(Trained, Hypernetwork, Encoder, Development),
)
#: The rules that make stages.
RULES = tuple(need.rule for need in _NEEDS)
