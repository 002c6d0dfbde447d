"""The commands that run a model: ``kmebench edit``, ``trace`` and ``apply``.

What they are asked for is checked before (:mod:`kmebench.cli.inputs`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from torch import Tensor

from kmebench import api
from kmebench.api import likeliest, load_found, says
from kmebench.cli import before_after
from kmebench.cli.before_after import Look
from kmebench.cli.inputs import Inputs
from kmebench.cli.terminal import Table, console, draw, table
from kmebench.data.openfacts import load_relations
from kmebench.data.records import EditRequest
from kmebench.edits.edit import Edit
from kmebench.errors import ConfigError, ModelError
from kmebench.io.logs import doing
from kmebench.models.editable import EditableModel
from kmebench.pipelines.one_fact import critical_shares
from kmebench.planning.by_hand import Source

OPENFACTS = Path("resources/openfacts")
#: Tokens of an answer that are shown, and those behind a longer target, by which its word ends.
_TOKENS, _BEHIND = 12, 2


# -- commands -------------------------------------------------------------------------------


def edit_command(arguments: argparse.Namespace, inputs: Inputs) -> None:
    """Edit, show what changed, save."""
    request, model, method = inputs.request, load_found(inputs.source), arguments.method
    prompts = [request.filled_prompt, *(arguments.neighbour or _neighbours(request))]
    editor = api.editor(model, method, covariance=arguments.covariance, **inputs.hparams)
    tokens = _answer_length(model, request)
    before = _look(model, prompts, tokens)
    start = time.perf_counter()
    with doing(f"editing by {method}"):
        result = api.edit(model, editor, [request])
    seconds = time.perf_counter() - start
    after = _look(model, prompts, tokens)
    found = before_after.verdicts(request.target_new, before.answers, after.answers)
    shown: list[RenderableType] = [
        f"{method}: {result.steps} steps, {seconds:.1f} s",
        before_after.next_tokens(prompts[0], request.target_new, before, after),
        before_after.answers(prompts, before, after, found),
        f"\n{before_after.summary(found)}",
    ]
    for each in shown:
        console.print(each)
    if arguments.plot:
        draw(arguments.plot, shown)
    if arguments.save_delta:
        result.edit.save(arguments.save_delta)
        console.print(f"delta: {arguments.save_delta}")
    if arguments.out:
        _save(model, arguments.out)


def _answer_length(model: EditableModel, request: EditRequest) -> int:
    """Return how many tokens an answer needs in which the whole target can stand."""
    (encoded,) = model.encode([(request.filled_prompt, request.target_new)])
    return max(_TOKENS, encoded.n_target + _BEHIND)


def _look(model: EditableModel, prompts: Sequence[str], tokens: int) -> Look:
    with doing("asking the model"):
        said = [says(model, prompt, tokens) for prompt in prompts]
        return Look(likeliest(model, prompts[0]), said)


def trace_command(arguments: argparse.Namespace, inputs: Inputs) -> None:
    """Trace, select, show."""
    request, model = inputs.request, load_found(inputs.source)
    if arguments.paths > model.ffn_width:
        raise ConfigError(
            f"--paths cannot be {arguments.paths}: disjoint paths take a segment each, and an FFN "
            f"matrix of this model has {model.ffn_width}."
        )
    with doing("tracing"):
        shares, paths = critical_shares(model, request, arguments.paths, arguments.score)
    nodes = 2 * model.n_layers * model.ffn_width
    console.print(_layers(request, shares, paths.positive[0]))
    console.print(
        f"The {shares.numel()} nodes of {arguments.paths} disjoint paths "
        f"({shares.numel() / nodes:.2%} of all) carry {float(shares.sum()):.1%} of the "
        f"impact ({arguments.score}) on “{request.target_new}”."
    )
    if arguments.plot:
        from kmebench.reporting.figures import draw_layers  # imports matplotlib: if wanted
        from kmebench.reporting.panels import save

        title = f"{request.filled_prompt} → {request.target_new}"
        save(draw_layers(shares.sum(dim=2).numpy(), title), arguments.plot)
        console.print(f"plot: {arguments.plot}")


def apply_command(arguments: argparse.Namespace, source: Source) -> None:
    """Load, apply, save."""
    edit = Edit.load(arguments.delta)
    api.check_weights_alone(edit)
    model = load_found(source)
    try:
        model.apply(edit)
    except ModelError as error:
        raise ModelError(f"{arguments.delta}: {error}") from error
    _save(model, arguments.out)


# -- inputs ---------------------------------------------------------------------------------


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


def _layers(request: EditRequest, shares: Tensor, index: Tensor, width: int = 14) -> Table:
    """One row per layer: how much of the impact its critical keys and values carry."""
    title = f"“{request.filled_prompt}” → “{request.target_new}”: impact of critical nodes by layer"
    names = ["layer", "keys", "", "values", "", "first key, value"]
    shown = table(title, names)
    for column in (2, 4):
        shown.columns[column].justify = "left"
    sums = shares.sum(dim=2)
    for layer, (key, value) in enumerate(sums.tolist()):
        bars = ["█" * round(width * x / float(sums.max())) for x in (key, value)]
        first = f"{int(index[layer, 0, 0])}, {int(index[layer, 1, 0])}"
        shown.add_row(str(layer), f"{key:.2%}", bars[0], f"{value:.2%}", bars[1], first)
    return shown


def _save(model: EditableModel, folder: Path) -> None:
    """Write the model, say where."""
    with doing(f"writing {folder}"):
        api.save(model, folder)
    console.print(f"model: {folder}")
