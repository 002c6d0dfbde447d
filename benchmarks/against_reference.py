"""Weight changes and seconds per edit of the editors here, beside those of public reference code.

python benchmarks/against_reference.py --toolkit FOLDER [--records 2] [--steps 5]

FOLDER is your own clone of EasyEdit (14cea824), of AlphaEdit's repository (f5248d3d) or of PAC's
(12401021). Both sides get the same model, records, contexts, second moments and hyper-parameters
(the defaults of the editors here, with --steps steps); all else is the code of each. Nothing of a
clone is copied, and nothing is written into it.
"""

import argparse
import csv
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from common import build, openfacts_requests, parser, table
from toolkits.alphaedit import AlphaEditCode
from toolkits.base import Batches, Run, Toolkit
from toolkits.easyedit import EasyEdit
from toolkits.pac import PACCode
from toolkits.values import edited_layers
from torch import Tensor

from kmebench.data.edit_sets import read_records
from kmebench.data.records import SLOT, EditRequest
from kmebench.data.sources import Source, fetch
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.contexts import Contexts, contexts_state, sample_contexts
from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.errors import ConfigError, KMEBenchError
from kmebench.models.editable import EditableModel
from kmebench.planning.config import read_config

TOOLKITS: tuple[type[Toolkit], ...] = (EasyEdit, AlphaEditCode, PACCode)
#: How the records are edited: each on the unedited model, all together, or one after another.
PIPELINES = {
    "rome": ("single",),
    "r-rome": ("single",),
    "alphaedit": ("single", "batch", "consecutive"),
    "prune": ("consecutive",),
    "pac-released": ("batch",),
}
HEADER = [
    "editor",
    "data",
    "edits",
    "cosine",
    "norm, ours / theirs",
    "ours (s/edit)",
    "theirs (s/edit)",
    "times",
]


@dataclass(frozen=True)
class Row:
    """One run on both sides."""

    editor: str
    data: str
    pipeline: str
    edits: int
    cosine: float
    norm_ratio: float
    seconds: float
    reference_seconds: float


# -- the two changes ------------------------------------------------------------------------


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return cosine and norm ratio (ours / theirs) of two changes, over all weights together.

    What one side does not name has not changed there. NaN where a side has changed nothing.
    """
    inner = sum(float((ours[name] * theirs[name]).sum()) for name in ours.keys() & theirs.keys())
    norms = [
        math.hypot(*(float(change.norm()) for change in side.values())) for side in (ours, theirs)
    ]
    if not all(norms):
        return math.nan, math.nan
    return inner / math.prod(norms), norms[0] / norms[1]


def our_run(
    editor: Editor, model: EditableModel, contexts: Contexts | None, batches: Batches
) -> Run:
    """Edit the unedited model as :meth:`Toolkit.run` does, with an editor of this project."""
    editor.load_state_dict({} if contexts is None else contexts_state(contexts))
    seconds = 0.0
    for batch in batches:
        start = time.perf_counter()
        model.apply(editor.edit(model, batch))
        seconds += time.perf_counter() - start
    model.apply(editor.final_edit(model))
    shapes = {name: model.parameter(name).shape for name in model.edits.total().weights}
    change = {n: part.dense(shapes[n]).double() for n, part in model.edits.total().weights.items()}
    model.revert()
    return Run(change, seconds / sum(map(len, batches)))


# -- what both sides are given ------------------------------------------------------------------


def find_toolkit(folder: Path) -> type[Toolkit]:
    """Tell by its content which toolkit a folder is, and whether its code is the known one.

    Raises:
        KMEBenchError: it is none, or another commit.
    """
    for toolkit in TOOLKITS:
        if (folder / toolkit.release.marker).is_file():
            toolkit.release.check(folder)
            return toolkit
    known = ", ".join(f"{t.release.name} ({t.release.commit[:8]})" for t in TOOLKITS)
    raise KMEBenchError(f"{folder} holds no toolkit that is known here: {known}.")


def records(name: str, config: Mapping[str, Any], mirror: str, scratch: Path) -> list[EditRequest]:
    """Return the usable records of a configured data set, in its order.

    Records with braces of their own are left out: the toolkits would fill them.
    """
    if name not in config:
        raise ConfigError(f"There is no data set {name!r}; there are {', '.join(config)}.")
    source = dict(config[name]["source"])
    if source.pop("source") == "openfacts":
        return openfacts_requests(100)
    raw = scratch / f"{name}.json"
    fetch(Source(**source), raw, mirror)
    found = [request for _, request in read_records(raw, config[name]["schema"], "skip")[0]]
    return [r for r in found if not set("{}") & set(r.filled_prompt + r.target_new)]


def given_contexts(model: EditableModel, editor: Editor) -> Contexts | None:
    """Sample an editor's contexts, without braces, which the toolkits would fill."""
    if not hasattr(editor, "lengths"):
        return None
    groups = sample_contexts(model, editor.lengths, seed=0)
    return tuple(tuple(_without_braces(text) for text in group) for group in groups)


def _without_braces(template: str) -> str:
    return template.removesuffix(SLOT).replace("{", " ").replace("}", " ") + SLOT


def hparams_of(toolkit: type[Toolkit], editor: str, steps: int) -> dict[str, Any]:
    """Return what differs from an editor's defaults."""
    length = {"epochs": steps} if editor == "pac-released" else {"steps": steps}
    return length | dict(toolkit.overrides.get(editor, {}))


def batches_of(pipeline: str, requests: Sequence[EditRequest]) -> list[Batches]:
    """Return the runs of a pipeline."""
    return {
        "single": [[[request]] for request in requests],
        "batch": [[requests]],
        "consecutive": [[[request] for request in requests]],
    }[pipeline]


# -- the comparison -------------------------------------------------------------------------------


def warm_up(
    toolkit: Toolkit, name: str, editor: Editor, contexts: Contexts | None, request: EditRequest
) -> None:
    """Let both sides make what they make once of the second moments, by an edit of one step."""
    if not hasattr(editor.hparams, "steps"):
        return
    asked = editor.hparams
    editor.hparams = replace(asked, steps=1)
    our_run(editor, toolkit.ours, contexts, [[request]])
    toolkit.run(name, editor.hparams, contexts, [[request]])
    editor.hparams = asked


def rows(
    toolkit: Toolkit, editors: Mapping[str, Editor], data: Mapping[str, Sequence[EditRequest]]
) -> Iterator[Row]:
    """Run both sides and yield a row for each run."""
    model = toolkit.ours
    for name, editor in editors.items():
        contexts = given_contexts(model, editor)
        warm_up(toolkit, name, editor, contexts, next(iter(data.values()))[0])
        for data_name, requests in data.items():
            for pipeline in PIPELINES.get(name, ("single", "batch")):
                for batches in batches_of(pipeline, requests):
                    torch.manual_seed(0)
                    mine = our_run(editor, model, contexts, batches)
                    torch.manual_seed(0)
                    theirs = toolkit.run(name, editor.hparams, contexts, batches)
                    yield Row(
                        name,
                        data_name,
                        pipeline,
                        sum(map(len, batches)),
                        *compare(mine.change, theirs.change),
                        mine.seconds,
                        theirs.seconds,
                    )


def summary(found: Sequence[Row]) -> str:
    """Return the table: of several runs of a kind the worst agreement and the median times."""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        kinds.setdefault((row.editor, row.data, row.pipeline), []).append(row)
    lines = []
    for (editor, data, pipeline), same in kinds.items():
        ours = statistics.median(row.seconds for row in same)
        theirs = statistics.median(row.reference_seconds for row in same)
        lines.append(
            [
                editor,
                data,
                f"{sum(row.edits for row in same)} {pipeline}",
                f"{min(row.cosine for row in same):.6f}",
                f"{max((row.norm_ratio for row in same), key=lambda r: abs(r - 1)):.4f}",
                f"{ours:.2f}",
                f"{theirs:.2f}",
                f"{theirs / ours:.1f}",
            ]
        )
    return table(HEADER, lines)


def heading(toolkit: type[Toolkit], editors: Sequence[str], arguments: argparse.Namespace) -> str:
    """Return what the table is about."""
    release = toolkit.release
    lines = [
        f"{release.name} at {release.commit[:8]}, {arguments.architecture or arguments.model.name} "
        f"in {arguments.dtype}, {arguments.steps} steps (PAC: epochs) and "
        f"{arguments.threads} threads on both sides; contexts and second moments are given, and "
        "making them is not in the seconds."
    ]
    lines += [f"- {name}: {toolkit.notes[name]}." for name in editors if name in toolkit.notes]
    return "\n".join(lines)


def facts(toolkit: type[Toolkit], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the runs of a file are of."""
    return {
        "toolkit": toolkit.release.name,
        "commit": toolkit.release.commit,
        "notes": dict(toolkit.notes),
        "model": arguments.architecture or arguments.model.name,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path, about: Mapping[str, Any], found: Sequence[Row]) -> None:
    """Write every run as CSV, or as JSON with what they are about."""
    lines = [asdict(row) for row in found]
    if path.suffix == ".json":
        path.write_text(json.dumps({**about, "runs": lines}, indent=2) + "\n", encoding="utf-8")
        return
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def options() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--toolkit", type=Path, required=True, help="your clone")
    found.add_argument("--records", type=int, default=2, help="of each data set")
    found.add_argument(
        "--data", nargs="+", default=["counterfact", "zsre"], help="data sets of --config"
    )
    found.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config.yaml"), Path("config/real.yaml")]
    )
    found.add_argument("--mirror", default=os.environ.get("KMEBENCH_DATA_MIRROR", ""))
    found.add_argument("--editors", nargs="+", help="some of those the toolkit has")
    found.add_argument(
        "--steps", type=int, default=5, help="of a target's optimisation; PAC: epochs"
    )
    found.add_argument("--out", type=Path, help="every run, as .csv or .json")
    return found.parse_args()


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """Compare, print, write."""
    if arguments.out and arguments.out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out {arguments.out}: the name ends in neither .csv nor .json.")
    folder = arguments.toolkit.resolve()
    kind = find_toolkit(folder)
    names = arguments.editors or list(kind.editors)
    if lacking := [name for name in names if name not in kind.editors]:
        raise ConfigError(
            f"{kind.release.name} has no {lacking[0]}; of the editors here it has "
            f"{', '.join(kind.editors)}."
        )
    config = read_config(arguments.config[0], arguments.config[1:])["datasets"]
    data = {
        name: records(name, config, arguments.mirror, scratch)[: arguments.records]
        for name in arguments.data
    }
    model = build(arguments)
    moments = scratch / "moments.safetensors"
    editors = {
        name: build_editor(name, hparams_of(kind, name, arguments.steps), {"covariance": moments})
        for name in names
    }
    layers = {layer for editor in editors.values() for layer in edited_layers(editor.hparams)}
    if layers:
        measure_covariance(moments, model, layers, TextSettings(tokens=2 * model.ffn_width))
    found = []
    with kind.standing_in(folder):
        toolkit = kind(folder, model, moments, scratch)
        for row in rows(toolkit, editors, data):
            found.append(row)
            print(*asdict(row).values(), flush=True)
    print(f"\n{heading(kind, names, arguments)}\n\n{summary(found)}")
    if arguments.out:
        write(arguments.out, facts(kind, arguments), found)


def main() -> None:
    arguments = options()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(arguments, Path(scratch).resolve())
    except KMEBenchError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
