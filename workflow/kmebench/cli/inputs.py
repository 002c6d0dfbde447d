"""What the commands that run a model are asked for, checked before torch is imported.

Models are those of the config (made by the workflow when they are not there yet) or any
Hugging Face folder of safetensors.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from kmebench.data.records import EditRequest
from kmebench.editors.registry import EDITORS
from kmebench.errors import ConfigError, ModelError
from kmebench.io.files import write_text
from kmebench.planning.config import read_checked_config
from kmebench.planning.grid import LOCATE_AND_EDIT, base_hparams, check_name
from kmebench.planning.hparams import check_values

CONFIG = Path("config.yaml")
console = Console(markup=False, emoji=False)


@dataclass(frozen=True)
class Model:
    """How a model is loaded: the arguments of ``EditableModel.load``."""

    folder: Path
    dtype: str
    device: str


@dataclass(frozen=True)
class Inputs:
    """What ``edit``, ``trace`` and ``apply`` start from; the editor is that of ``edit``."""

    model: Model
    request: EditRequest | None = None
    editor: str = ""
    hparams: dict[str, Any] | None = None
    moments: Path | None = None
    asking: dict[str, Any] | None = None  # an overlay in which the workflow makes these moments
    seed: int = 0


def edit_inputs(arguments: argparse.Namespace) -> Inputs:
    """Check the fact, the model, the editor and its values.

    Raises:
        ConfigError: something asked for does not exist, or contradicts itself.
    """
    request, config = request_of(arguments), config_of(arguments)
    model = model_of(arguments, config)
    editor, hparams = editor_of(arguments, config)
    moments = moments_of(arguments, config, editor, hparams)
    asking = asking_overlay(arguments.model, config, editor, hparams) if moments else None
    return Inputs(model, request, editor, hparams, moments, asking, config.get("seed", 0))


def trace_inputs(arguments: argparse.Namespace) -> Inputs:
    """Check the fact and the model; see :func:`edit_inputs`."""
    return Inputs(model_of(arguments, config_of(arguments)), request_of(arguments))


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
    """Return the editor behind the method, and its hyper-parameters."""
    hparams: dict[str, Any] = {}
    name = arguments.method
    if name in config.get("methods", {}):
        # Of a folder, which the config knows nothing about, the method's own.
        hparams = base_hparams(config, arguments.model, name, "consecutive")
        name = config["methods"][name].get("editor", name)
    else:
        check_name(name, [*EDITORS, *config.get("methods", {})], "the config", "--method")
    for values in arguments.set:
        check_values("--set", name, values)
        hparams |= values
    if name == "pac":
        hparams |= {"trace_on": "current"}  # there is no cached trace of this request
    return name, hparams


def moments_of(
    arguments: argparse.Namespace, config: dict[str, Any], editor: str, hparams: dict[str, Any]
) -> Path | None:
    """Return the file of second moments, if the editor reads one."""
    if editor not in LOCATE_AND_EDIT or not hparams.get("second_moment", True):
        return None
    if arguments.moments:
        return Path(arguments.moments)
    if arguments.model not in config.get("models", {}):
        raise ConfigError(
            f"The editor of {arguments.method!r} needs second moments of {arguments.model}: name "
            "their file by --moments, or take a model of the config, for which it is made."
        )
    return Path(results_of(config), "moments", f"{arguments.model}.safetensors")


def asking_overlay(
    model: str, config: dict[str, Any], editor: str, hparams: dict[str, Any]
) -> dict[str, Any]:
    """Return an overlay that asks for this edit, so that its layers are among those of the moments.

    The workflow takes moments of the layers that the runs of the config read, and no others.
    """
    experiment = {
        "mode": "consecutive",
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
