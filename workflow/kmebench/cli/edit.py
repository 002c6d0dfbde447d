"""The commands that run a model: ``kmebench edit``, ``trace`` and ``apply``.

What they are asked for is checked before (:mod:`kmebench.cli.inputs`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from kmebench.cli.inputs import FactInputs, Inputs, Model, make
from kmebench.data.openfacts import load_relations
from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.locate.covariance.store import check_covariance
from kmebench.edits.edit import Edit
from kmebench.errors import ConfigError, ModelError
from kmebench.io.checked_files import users_own
from kmebench.models.editable import SPREAD, EditableModel, pick_device, seed_everything
from kmebench.models.sources import save_model
from kmebench.pipelines.one_fact import critical_shares, edit_fact, likeliest, next_token, says

OPENFACTS = Path("resources/openfacts")
console = Console(markup=False, emoji=False)


# -- commands -------------------------------------------------------------------------------


def edit_command(arguments: argparse.Namespace, inputs: FactInputs) -> None:
    """Edit, show what changed, save."""
    with users_own(arguments.covariance):
        _edit(arguments, inputs)


def _edit(arguments: argparse.Namespace, inputs: FactInputs) -> None:
    request = inputs.request
    if arguments.covariance:
        check_covariance(arguments.covariance)
    editor = build_editor(inputs.editor, inputs.hparams, inputs.assets)
    model = _load(inputs.model, arguments)
    for path in inputs.assets.values():
        make(path, arguments.configfile, inputs.asking)
    neighbours = arguments.neighbour or _neighbours(request)
    prompts = [request.filled_prompt, *neighbours]
    likely, said = _top(model, prompts[0]), [says(model, p) for p in prompts]
    seed_everything(inputs.seed)
    start = time.perf_counter()
    result = edit_fact(model, editor, request)
    seconds = time.perf_counter() - start
    console.print(f"{arguments.method}: {result.steps} steps, {seconds:.1f} s\n")
    console.print(_next_tokens(prompts[0], likely, _top(model, prompts[0])))
    console.print(_changes(prompts, said, [says(model, p) for p in prompts]))
    if not neighbours:
        console.print("OpenFacts knows no neighbours of this subject; name some by --neighbour.")
    if arguments.save_delta:
        result.edit.save(arguments.save_delta)
        console.print(f"delta: {arguments.save_delta}")
    if arguments.out:
        _save(model, arguments.out)


def trace_command(arguments: argparse.Namespace, inputs: FactInputs) -> None:
    """Trace, select, show."""
    request, model = inputs.request, _load(inputs.model, arguments)
    if arguments.paths > model.ffn_width:
        raise ConfigError(
            f"--paths cannot be {arguments.paths}: disjoint paths take a segment each, and an FFN "
            f"matrix of this model has {model.ffn_width}."
        )
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


def apply_command(arguments: argparse.Namespace, inputs: Inputs) -> None:
    """Load, apply, save."""
    edit = Edit.load(arguments.delta)
    if edit.overlays:
        raise ModelError(
            f"{arguments.delta} holds the overlays {', '.join(edit.overlays)}, which a folder of "
            "weights cannot carry; apply it in Python (docs/python.md)."
        )
    model = _load(inputs.model, arguments)
    try:
        model.check(edit)
    except ModelError as error:
        raise ModelError(f"{arguments.delta}: {error}") from error
    model.apply(edit)
    _save(model, arguments.out)


# -- inputs ---------------------------------------------------------------------------------


def _load(model: Model, arguments: argparse.Namespace) -> EditableModel:
    """Load the model; the workflow makes one of the config that is not there yet."""
    if model.device not in SPREAD:
        pick_device(model.device)  # fail before a model is made
    make(model.folder, arguments.configfile)
    return EditableModel.load(model.folder, dtype=model.dtype, device=model.device)


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
    save_model(model.model, model.tokenizer, folder)
    console.print(f"model: {folder}")
