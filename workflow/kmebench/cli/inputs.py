"""What the commands that run a model are asked for, checked before torch is imported.

Models are those of the config (made by the workflow when they are not there yet) or any
Hugging Face folder of safetensors.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from kmebench.data.records import EditRequest
from kmebench.editors.cards import card_of, plain, registered
from kmebench.editors.needs import Covariance, Need, Pipeline, Trained
from kmebench.errors import ConfigError, ModelError
from kmebench.io.files import write_text
from kmebench.planning import grid
from kmebench.planning.config import read_checked_config
from kmebench.planning.grid import base_hparams, check_name

CONFIG = Path("config.yaml")
#: One fact is edited as a consecutive run of one edit.
PIPELINE = Pipeline("consecutive", 1)
console = Console(markup=False, emoji=False)


@dataclass(frozen=True)
class Model:
    """How a model is loaded: the arguments of ``EditableModel.load``."""

    folder: Path
    dtype: str
    device: str


@dataclass(frozen=True)
class Inputs:
    """What ``apply`` starts from."""

    model: Model


@dataclass(frozen=True)
class FactInputs(Inputs):
    """What ``edit`` and ``trace`` start from; the editor is that of ``edit``."""

    request: EditRequest
    editor: str = ""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, Path] = field(default_factory=dict)  # files of cached stages
    asking: dict[str, Any] | None = None  # an overlay in which the workflow makes these
    seed: int = 0


def edit_inputs(arguments: argparse.Namespace) -> FactInputs:
    """Check the fact, the model, the editor and its values.

    Raises:
        ConfigError: something asked for does not exist, or contradicts itself.
    """
    request, config = request_of(arguments), config_of(arguments)
    model = model_of(arguments, config)
    editor, hparams = editor_of(arguments, config)
    card = card_of(editor)
    assets = assets_of(arguments, config, card.needs(card.values(hparams), PIPELINE))
    asking = asking_overlay(arguments.model, config, editor, hparams) if assets else None
    return FactInputs(model, request, editor, hparams, assets, asking, config.get("seed", 0))


def trace_inputs(arguments: argparse.Namespace) -> FactInputs:
    """Check the fact and the model; see :func:`edit_inputs`."""
    return FactInputs(model_of(arguments, config_of(arguments)), request_of(arguments))


def apply_inputs(arguments: argparse.Namespace) -> Inputs:
    """Check the model; see :func:`edit_inputs`."""
    return Inputs(model_of(arguments, config_of(arguments)))


def request_of(arguments: argparse.Namespace) -> EditRequest:
    """Return the fact to edit or to trace."""
    try:
        return EditRequest("edit", arguments.subject, arguments.prompt, arguments.target)
    except ValueError as error:
        raise ConfigError(f"This fact cannot be edited: {error}.") from error


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read config.yaml with its overlays; a folder may be edited without any config."""
    if not CONFIG.is_file() and not arguments.configfile:
        return {}
    return read_checked_config(CONFIG, arguments.configfile)


def model_of(arguments: argparse.Namespace, config: dict[str, Any]) -> Model:
    """Return where the model is, or will be made."""
    folder, dtype = Path(arguments.model), arguments.dtype
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            raise ModelError(f"{folder} holds no Hugging Face model: it has no config.json.")
        check_name(arguments.model, config.get("models", {}), "models", "--model")
        dtype = dtype or config["models"][arguments.model].get("dtype")
        folder = Path(results_of(config), "models", arguments.model)
    return Model(folder, dtype or "float32", arguments.device)


def editor_of(arguments: argparse.Namespace, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the editor behind the method, and all its hyper-parameters."""
    hparams: dict[str, Any] = {}
    name, methods = arguments.method, config.get("methods", {})
    if name in methods:
        # Of a folder, which the config knows nothing about, the method's own.
        hparams |= base_hparams(config, arguments.model, name, PIPELINE.mode)
        name = grid.editor_of(config, name)
    elif ":" not in name:
        check_name(name, [*registered(), *methods], "the config", "--method")
    card = card_of(name)
    for values in arguments.set:
        card.values(values, "--set")
        hparams |= values
    return name, plain(card.values({**hparams, **card.single}))


def assets_of(
    arguments: argparse.Namespace, config: dict[str, Any], needs: Sequence[Need]
) -> dict[str, Path]:
    """Return the files of cached stages that the edit reads: the user's own, or the workflow's.

    Raises:
        ConfigError: there is no such file, and none can be made.
    """
    assets = {}
    for need in needs:
        if need.asset == Covariance.asset and arguments.covariance:
            assets[need.asset] = Path(arguments.covariance)
        elif arguments.model in config.get("models", {}):
            path = need.path(arguments.model, first_dataset(config, need))
            assets[need.asset] = Path(results_of(config), path)
        else:
            own = "name its file by --covariance, or " if need.asset == Covariance.asset else ""
            raise ConfigError(
                f"The method {arguments.method!r} needs the {need.asset} of {arguments.model}: "
                f"{own}take a model of the config, for which the workflow makes it."
            )
    return assets


def first_dataset(config: dict[str, Any], need: Need) -> str:
    """Return the data set that a stage is made on: what is trained needs a development split."""
    datasets = config["datasets"]
    developed = [name for name, spec in datasets.items() if spec.get("development")]
    return next(iter(developed if isinstance(need, Trained) and developed else datasets))


def asking_overlay(
    model: str, config: dict[str, Any], editor: str, hparams: dict[str, Any]
) -> dict[str, Any]:
    """Return an overlay that asks for this edit, so that its layers are among those covered.

    The workflow takes the covariance of the layers that the runs of the config read, and no others.
    """
    experiment = {
        "mode": PIPELINE.mode,
        "models": [model],
        "datasets": list(config.get("datasets", {}))[:1],
        "methods": ["kmebench-edit"],
    }
    return {
        "methods": {"kmebench-edit": {"editor": editor, "hparams": hparams}},
        "experiments": {"kmebench-edit": experiment},
    }


def results_of(config: dict[str, Any]) -> str:
    """Where the workflow's results go."""
    return str(config.get("pathvars", {}).get("results", "results"))


def make(path: Path, overlays: Sequence[Path], asking: dict[str, Any] | None = None) -> None:
    """Let the workflow make what is not there yet, by the config with overlays; ``asking`` is one.

    Raises:
        ModelError: it cannot; says why.
    """
    if path.exists():
        return
    console.print(f"making {path} (once)")
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    command += ["--quiet", "progress", "rules", "host", "reason"]
    with tempfile.TemporaryDirectory() as folder:
        files = [*map(str, overlays)]
        if asking:
            files.append(f"{folder}/asking.yaml")
            write_text(files[-1], yaml.safe_dump(asking))
        command += ["--configfile", *files] if files else []
        command += ["--", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"{path} could not be made: {reason(done.stderr)}")


def reason(log: str) -> str:
    """Find why the workflow failed in what it wrote: a rule's sentence, or Snakemake's last error.

    All that it wrote, if there is neither.
    """
    if told := re.findall(r"^[a-z_]+: .*", log, re.MULTILINE):
        return str(told[-1])
    errors = re.split(r"^\w+(?:Error|Exception)(?: in file .*)?:?\n", log, flags=re.MULTILINE)
    lines = errors[-1].splitlines()
    return " ".join(line for line in lines if not line.startswith(" "))
