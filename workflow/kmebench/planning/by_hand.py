"""What is edited by hand, from Python or the command line. Imports no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from kmebench.data.records import EditRequest
from kmebench.editors.cards import card_of, plain, registered
from kmebench.editors.needs import (
    Covariance,
    Development,
    Encoder,
    Hypernetwork,
    Inverse,
    Need,
    NeutralMetric,
    Pipeline,
    Spectrum,
    Trained,
)
from kmebench.errors import ConfigError, ModelError
from kmebench.names import near_name, nearest
from kmebench.planning import grid
from kmebench.planning.config import CONFIG, read_checked_config
from kmebench.planning.workflow import SNAKEFILE

DEVICES = ("auto", "cpu", "mps", "cuda", "balanced", "sequential")
#: Facts are given by hand, so no stage of a data set is cached for them.
_PIPELINE = Pipeline("consecutive", 1)
#: What the workflow makes whatever fact is edited.
MadeByWorkflow = Trained | Hypernetwork | Encoder | Development
#: Needs that can be met without a data set.
MadeByHand = Covariance | Inverse | NeutralMetric | Spectrum | MadeByWorkflow
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Kind(StrEnum):
    """What the name of a model names."""

    CONFIG = "a model of the config"
    FOLDER = "a Hugging Face folder"
    GGUF = "a GGUF file"
    HUB = "a repository of the hub"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, how it is loaded, and the config that it is edited by."""

    name: str
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict)  # empty where there is none
    configfiles: tuple[Path, ...] = ()
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"

    @property
    def results(self) -> Path:
        """Where the workflow's results go."""
        return Path(self.config.get("pathvars", {}).get("results", "results"))

    @property
    def seed(self) -> int:
        """The seed of every edit."""
        return int(self.config.get("seed", 0))


def find_model(
    name: str | Path,
    configfiles: Sequence[str | Path] = (),
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Source:
    """Find out what ``name`` names: a .gguf file, a folder, a model of the config, a hub id.

    ``configfiles`` are merged over config.yaml, which is read where a Snakefile lies beside it.

    Raises:
        ConfigError: the config is wrong, or there is no such model, dtype or device.
        ModelError: there is a folder, and it holds no model.
    """
    if isinstance(configfiles, str) or not isinstance(configfiles, Sequence):
        raise ConfigError(f"configfiles is a list of files; not {configfiles!r}.")
    name, files = str(name), tuple(map(Path, configfiles))
    config = read_checked_config(CONFIG, files) if files or _in_checkout() else {}
    kind = _kind(name, config.get("models", {}))
    if revision and kind is not Kind.HUB:
        raise ConfigError(f"{name} is {kind}: only a repository of the hub has a revision.")
    own = config["models"][name].get("dtype") if kind is Kind.CONFIG else None
    loading = checked_loading(dtype or own, device)
    return Source(name, kind, config, files, revision, **loading)


def checked_loading(dtype: str | None, device: str) -> dict[str, str]:
    """Return how a model is loaded, by default in float32.

    Raises:
        ConfigError: there is no such dtype or device.
    """
    device = str(device)  # a torch.device too
    if not re.fullmatch(r"cuda:[0-9]+", device):
        _one_of("device", DEVICES, device)
    return {"dtype": _one_of("dtype", grid.BYTES, str(dtype or "float32")), "device": device}


def _in_checkout() -> bool:
    """Whether config.yaml is this workflow's: many a folder has a file of that name."""
    return CONFIG.is_file() and SNAKEFILE.is_file()


def _kind(name: str, models: Iterable[str]) -> Kind:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {name}.")
        return Kind.GGUF
    if (path / "config.json").is_file():
        return Kind.FOLDER
    if path.is_file():
        raise ModelError(f"{name} is a file: name its folder, or a .gguf file.")
    if path.is_dir():
        raise ModelError(f"{name} holds no Hugging Face model: it has no config.json.")
    if name in models:
        return Kind.CONFIG
    if _HUB.fullmatch(name):
        return Kind.HUB
    raise ConfigError(
        f"There is no model {name!r}: it is no folder, no .gguf file, no id of the hub "
        "(owner/name) and no model of the config; "
        + (nearest(name, models) if models else "to use one, run this in the folder of KME-Bench.")
    )


def _one_of(what: str, known: Iterable[str], text: str) -> str:
    if text not in known:
        near = near_name(text, known)
        raise ConfigError(
            f"{what} cannot be {text!r}: it is one of {', '.join(known)}"
            + (f"; did you mean {near!r}?" if near else ".")
        )
    return text


def fact(subject: str, prompt: str, target: str) -> EditRequest:
    """Return a fact to edit: ``prompt``, with ``{}`` for the subject, is to go on by ``target``.

    Raises:
        ConfigError: no editor could use it; says why.
    """
    try:
        request = EditRequest("fact", subject, prompt, target)
    except ValueError as error:
        reason = re.sub("^target_new", "target", str(error))  # what it is called here
        raise ConfigError(f"This fact cannot be edited: {reason}.") from error
    return replace(request, case_id=subject)


@dataclass(frozen=True)
class Method:
    """An editor with all its hyper-parameters, and the files that it reads."""

    editor: str
    hparams: Mapping[str, Any]
    needs: tuple[MadeByHand, ...]


def method_of(
    source: Source, name: str, settings: Mapping[str, Any], mode: str = "consecutive"
) -> Method:
    """Return a method of the config, or a registered editor, or ``package.module:CARD``.

    Values are those of the config for this model and pipeline, with ``settings`` over them.

    Raises:
        ConfigError: there is no such method or value, or it needs what nobody can make.
    """
    _one_of("mode", grid.MODES, mode)
    methods, hparams, editor = source.config.get("methods", {}), {}, name
    if name in methods:
        # Of a model that the config does not know, the method's own.
        hparams = grid.base_hparams(source.config, source.name, name, mode)
        editor = grid.editor_of(source.config, name)
    elif ":" not in name and name not in registered():
        known = dict.fromkeys([*registered(), *methods])
        raise ConfigError(f"There is no method {name!r}; {nearest(name, known)}")
    card = card_of(editor)
    card.values(settings, f"method {name!r}")
    values = card.values({**hparams, **card.configured(settings), **card.single})
    needs = tuple(_can_be_met(source, name, need) for need in card.needs_of(values, _PIPELINE))
    return Method(editor, plain(values), needs)


def _can_be_met(source: Source, method: str, need: Need) -> MadeByHand:
    """Return a need, but refuse one of a data set; what is trained once, the workflow trains."""
    if isinstance(need, Covariance | Inverse | NeutralMetric | Spectrum):
        return need
    if isinstance(need, Trained | Hypernetwork) and source.kind is Kind.CONFIG:
        return need
    if isinstance(need, Encoder | Development):
        if not source.config:
            raise ConfigError(
                f"The method {method!r} needs the {need.asset} that the workflow brings; edit in "
                "the folder of KME-Bench."
            )
        return need
    if isinstance(need, Trained | Hypernetwork):
        raise ConfigError(
            f"The method {method!r} needs what it learns on a data set. The workflow makes it for "
            "models of the config alone: name this model under models, and take it by that name."
        )
    raise ConfigError(
        f"The method {method!r} needs {need.asset} of a data set, which the workflow alone makes; "
        "run an experiment."
    )


def workflow_path(source: Source, need: MadeByWorkflow) -> Path:
    """Return what the workflow makes: of the first data set with the split that it is made of.

    Raises:
        ConfigError: no data set has enough records to train a network on.
    """
    datasets = source.config["datasets"]
    if isinstance(need, Hypernetwork):
        return source.results / need.path(source.name, _trained_on(datasets, need))
    developed = [name for name, spec in datasets.items() if spec.get("development")]
    return source.results / need.path(source.name, (developed or list(datasets))[0])


def _trained_on(datasets: Mapping[str, Any], need: Hypernetwork) -> str:
    for name, spec in datasets.items():
        if spec["training"] >= need.records:
            return name
    raise ConfigError(
        f"The network of {need.editor!r} is trained on {need.records} records a step, and no data "
        f"set has so many for training; set datasets.{next(iter(datasets))}.training."
    )
