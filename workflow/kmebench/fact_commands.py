"""The commands that run a model: ``kmebench edit``, ``trace`` and ``apply``.

Models are those of the config (made by the workflow when they are not there yet) or any
Hugging Face folder of safetensors.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from kmebench.data.openfacts import load_relations
from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.registry import EDITORS
from kmebench.errors import ConfigError, ModelError
from kmebench.experiments.configuration import read_checked_config
from kmebench.experiments.grid import (
    LOCATE_AND_EDIT,
    base_hparams,
    check_name,
    parse_variant,
)
from kmebench.experiments.single import critical_shares, edit_fact, likeliest, next_token, says
from kmebench.models.editable import EditableModel, seed_everything
from kmebench.models.sources import save_model
from kmebench.weights.delta import WeightDelta

OPENFACTS = Path("resources/openfacts")
console = Console()


# -- commands -------------------------------------------------------------------------------


def edit_command(arguments: argparse.Namespace) -> None:
    """Edit, show what changed, save."""
    request = _request(arguments)
    model, config = _model(arguments)
    editor = _editor(arguments, config)
    neighbours = arguments.neighbour or _neighbours(request)
    prompts = [request.filled_prompt, *neighbours]
    likely, said = _top(model, prompts[0]), [says(model, p) for p in prompts]
    seed_everything(config.get("seed", 0))
    start = time.perf_counter()
    delta = edit_fact(model, editor, request)
    seconds = time.perf_counter() - start
    console.print(f"{arguments.method}: {editor.steps} steps, {seconds:.1f} s\n")
    console.print(_next_tokens(prompts[0], likely, _top(model, prompts[0])))
    console.print(_changes(prompts, said, [says(model, p) for p in prompts]))
    if not neighbours:
        console.print("OpenFacts knows no neighbours of this subject; name some by --neighbour.")
    if arguments.save_delta:
        delta.save(arguments.save_delta)
        console.print(f"delta: {arguments.save_delta}")
    if arguments.out:
        _save(model, arguments.out)


def trace_command(arguments: argparse.Namespace) -> None:
    """Trace, select, show."""
    request = _request(arguments)
    model, _ = _model(arguments)
    shares, paths = critical_shares(model, request, arguments.paths, arguments.score)
    nodes = 2 * model.n_layers * model.ffn_width
    console.print(_layers(request, shares, paths.positive[0]))
    console.print(
        f"The {shares.numel()} nodes of {arguments.paths} disjoint paths "
        f"({shares.numel() / nodes:.2%} of all) carry {float(shares.sum()):.1%} of the "
        f"impact ({arguments.score}) on “{request.target_new}”."
    )
    if arguments.plot:
        from kmebench.reporting.figures import draw_layers, save  # imports matplotlib: if wanted

        title = f"{request.filled_prompt} → {request.target_new}"
        save(draw_layers(shares.sum(dim=2).numpy(), title), arguments.plot)
        console.print(f"plot: {arguments.plot}")


def apply_command(arguments: argparse.Namespace) -> None:
    """Load, apply, save."""
    model, _ = _model(arguments)
    delta = WeightDelta.load(arguments.delta)
    if unknown := sorted(set(delta) - {name for name, _ in model.model.named_parameters()}):
        raise ModelError(f"{arguments.delta} changes {unknown[0]!r}, which this model lacks.")
    model.apply(delta)
    _save(model, arguments.out)


# -- inputs ---------------------------------------------------------------------------------


def _request(arguments: argparse.Namespace) -> EditRequest:
    try:
        return EditRequest("edit", arguments.subject, arguments.prompt, arguments.target)
    except ValueError as error:
        raise ConfigError(f"This fact cannot be edited: {error}.") from error


def _model(arguments: argparse.Namespace) -> tuple[EditableModel, dict[str, Any]]:
    """Load the model; one of the config is made by the workflow if it is not there."""
    config: dict[str, Any] = {}
    if arguments.config.is_file():
        config = read_checked_config(arguments.config)
    folder, dtype = Path(arguments.model), arguments.dtype
    if not (folder / "config.json").is_file():
        check_name(arguments.model, config.get("models", {}), "models", "--model")
        dtype = dtype or config["models"][arguments.model].get("dtype")
        folder = Path("results/models") / arguments.model
        _make(folder)
    return EditableModel.load(folder, dtype=dtype or "float32", device=arguments.device), config


def _make(path: Path) -> None:
    """Let the workflow make what is not there yet."""
    if path.exists():
        return
    console.print(f"making {path} (once)")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "all", "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"{path} could not be made:\n{done.stdout}{done.stderr}")


def _editor(arguments: argparse.Namespace, config: dict[str, Any]) -> Editor:
    hparams: dict[str, Any] = {}
    name = arguments.method
    if name in config.get("methods", {}):
        method = config["methods"][name]
        # Of a folder, which the config knows nothing about, the method's own.
        hparams = base_hparams(config, arguments.model, name, "consecutive")
        name = method.get("editor", name)
    else:
        check_name(name, EDITORS, "the list of editors", "--method")
    for item in arguments.set:
        if "=" not in item:
            raise ConfigError(f"--set {item} is not of the form NAME=VALUE.")
        hparams |= parse_variant(item)
    if name == "pac":
        hparams |= {"trace_on": "current"}  # there is no cached trace of this request
    moments = name in LOCATE_AND_EDIT and hparams.get("second_moment", True)
    return build_editor(name, hparams, {"moments": _moments(arguments, config)} if moments else {})


def _moments(arguments: argparse.Namespace, config: dict[str, Any]) -> Path:
    """Return the file of second moments; the workflow makes it for models of the config."""
    if arguments.moments:
        return arguments.moments
    if arguments.model not in config.get("models", {}):
        raise ConfigError(
            f"The editor of {arguments.method!r} needs second moments of {arguments.model}: name "
            "their file by --moments, or take a model of the config, for which it is made."
        )
    path = Path("results/moments") / f"{arguments.model}.safetensors"
    _make(path)
    return path


def _neighbours(request: EditRequest, count: int = 5) -> list[str]:
    """Ask the same about other subjects of a relation that knows this one."""
    if not OPENFACTS.is_dir():
        return []
    for relation in load_relations(OPENFACTS):
        subjects = [subject for subject, _ in relation.facts]
        if request.subject in subjects:
            subjects.remove(request.subject)
            return [request.asked_of(subject) for subject in subjects[:count]]
    return []


# -- outputs --------------------------------------------------------------------------------


def _top(model: EditableModel, prompt: str) -> list[tuple[str, float]]:
    return likeliest(model, next_token(model, prompt))


def _next_tokens(
    prompt: str, before: Sequence[tuple[str, float]], after: Sequence[tuple[str, float]]
) -> Table:
    table = Table(
        "before", "", "after", "", title=f"next token of “{prompt}”", title_justify="left"
    )
    for (old, p), (new, q) in zip(before, after, strict=True):
        table.add_row(repr(old), f"{p:.1%}", repr(new), f"{q:.1%}")
    return table


def _changes(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    title = "what the model says to the edited prompt and to its neighbours"
    table = Table("prompt", "before", "after", "", title=title, title_justify="left")
    for place, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True)):
        table.add_row(prompt, old, new, "same" if old == new else "changed")
        if place == 0:
            table.add_section()
    return table


def _layers(request: EditRequest, shares: Tensor, index: Tensor, width: int = 14) -> Table:
    """One row per layer: how much of the impact its critical keys and values carry."""
    title = f"“{request.filled_prompt}” → “{request.target_new}”: impact of critical nodes by layer"
    table = Table("layer", "keys", "", "values", "", "first key, value", title=title)
    sums = shares.sum(dim=2)
    for layer, (key, value) in enumerate(sums.tolist()):
        bars = ["█" * round(width * x / float(sums.max())) for x in (key, value)]
        first = f"{int(index[layer, 0, 0])}, {int(index[layer, 1, 0])}"
        table.add_row(str(layer), f"{key:.2%}", bars[0], f"{value:.2%}", bars[1], first)
    return table


def _save(model: EditableModel, folder: Path) -> None:
    """Write the model as a Hugging Face folder."""
    if folder.exists():
        raise ModelError(f"{folder} exists already; name another folder, or delete it.")
    save_model(model.model, model.tokenizer, folder)
    console.print(f"model: {folder}")
