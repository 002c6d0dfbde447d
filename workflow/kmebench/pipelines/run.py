"""One cell of the grid: from a model and requests to the files of a run folder."""

import hashlib
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pandas as pd
import torch

from kmebench import __version__
from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.cards import plain
from kmebench.edits.edit import Edit
from kmebench.edits.weights import WeightDelta
from kmebench.evaluation.frames import beside_original, write_frame
from kmebench.evaluation.health import NeutralText, health
from kmebench.evaluation.predict import Settings
from kmebench.evaluation.prompts import askable
from kmebench.evaluation.schema import NORMS, PREDICTIONS
from kmebench.io import origins
from kmebench.io.checked_files import read_parquet
from kmebench.io.files import write_json
from kmebench.models.editable import EditableModel, describe
from kmebench.modes import split_mode
from kmebench.pipelines.checkpoints import Checkpoints, Outcome, norms_frame
from kmebench.pipelines.footprint import gate_shares
from kmebench.pipelines.pipelines import (
    Measure,
    Setup,
    run_batches,
    run_breadth_first,
    run_consecutive,
)

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "pandas",
    "snakemake",
)


class CellSettings(TypedDict):
    """How a run is made; a mapping, because run.json has it as it is, without absent keys."""

    mode: str  # with the size of a turn: kmebench.modes
    editor: str
    hparams: Mapping[str, Any]
    seed: int
    batch_size: NotRequired[int]  # of pipeline batch
    milestone_sample: NotRequired[int | None]  # of pipeline consecutive
    on_bad_record: Literal["error", "skip"]
    load: Mapping[str, str]  # how the model was
    evaluation: Mapping[str, int]  # fields of kmebench.evaluation.predict.Settings
    checkpoint_every: int
    on_failed_edit: Literal["error", "skip"]


#: Settings by which no saved state differs: when it is saved, what an edit does that cannot be made
#: (there is none in it, or it is noted there), and which requests are asked, which are digested.
_DECIDE_NOTHING = ("checkpoint_every", "on_failed_edit", "on_bad_record")


def run_cell(
    load: Callable[[], EditableModel],
    requests: Sequence[EditRequest],
    settings: CellSettings,
    *,
    assets: Mapping[str, str],
    original: str,
    inputs: Mapping[str, Sequence[str]],
    output: Mapping[str, str],
    neutral: str | None = None,
) -> None:
    """Edit, predict and write ``output``: predictions, timing, run, norms, delta, health.

    Health is measured on the text in the file ``neutral``, if there is one, and never in batches.
    Requests that the model cannot be asked are left out. ``inputs`` are the files and folders that
    the outcome depends on, by what they are: ``model``, ``code`` and so on. A checkpoint made with
    others, or with other settings that decide the outcome or other requests, is not resumed.
    """
    started = time.perf_counter()
    model = load()
    load_seconds = time.perf_counter() - started
    evaluation = Settings(**settings["evaluation"])
    requests = askable(model, requests, evaluation.wild_max_tokens, settings["on_bad_record"])
    editor = build_editor(settings["editor"], settings["hparams"], assets)
    checkpoints = Checkpoints(
        Path(output["predictions"]).parent / "checkpoints",
        settings["checkpoint_every"],
        {
            "settings": {k: v for k, v in settings.items() if k not in _DECIDE_NOTHING},
            "requests": _digest(requests),
            "inputs": {name: origins.digest_of(paths) for name, paths in inputs.items()},
        },
        "epochs" if settings["mode"] == "breadth_first" else "edits",
    )
    skip_failed = settings["on_failed_edit"] == "skip"
    measure = measured_on(neutral, evaluation.batch_size) if neutral else None
    setup = Setup(model, editor, evaluation, checkpoints, skip_failed, measure)
    outcome = run_pipeline(setup, requests, settings)
    frame = beside_original(outcome.predictions, read_parquet(original), original)
    write_json(output["timing"], timing(outcome, model, settings, load_seconds))
    write_json(output["run"], record(outcome, model, editor, requests, settings))
    # Batches are rolled back: at their end the model carries nothing.
    (outcome.edit or Edit.of(WeightDelta({}))).save(output["delta"])
    write_json(output["health"], outcome.health)
    write_frame(norms_frame(outcome), NORMS, output["norms"])
    write_frame(frame, PREDICTIONS, output["predictions"])
    checkpoints.clear()


def run_pipeline(setup: Setup, requests: Sequence[EditRequest], settings: CellSettings) -> Outcome:
    """Run the pipeline that the settings name."""
    pipeline, turn = split_mode(settings["mode"])
    if pipeline == "batch":
        return run_batches(setup, requests, settings["batch_size"])
    if pipeline == "breadth_first":
        return run_breadth_first(setup, requests)
    ordered = in_order(requests, settings["seed"])
    return run_consecutive(setup, ordered, turn, settings["milestone_sample"])


def measured_on(neutral: str, batch_size: int) -> Measure:
    """Return what measures a model's health on the text in a file."""
    text = NeutralText.open(neutral)
    return lambda model: health(model, text, batch_size)


def in_order(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """Order consecutive edits: as the data set has them for seed 0, else shuffled by the seed."""
    ordered = list(requests)
    if seed:
        random.Random(seed).shuffle(ordered)
    return ordered


def timing(
    outcome: Outcome, model: EditableModel, settings: CellSettings, load_seconds: float
) -> dict[str, Any]:
    """Summarise where the time went; evaluation and loading are not part of an edit."""
    n = sum(call["requests"] for call in outcome.times)
    names = sorted({name for call in outcome.times for name in call["seconds"]})
    seconds = {m: sum(call["seconds"].get(m, 0.0) for call in outcome.times) / n for m in names}
    per_edit = [sum(call["seconds"].values()) / call["requests"] for call in outcome.times]
    return {
        "pipeline": settings["mode"],
        "batch_size": max(call["requests"] for call in outcome.times),
        "requests": n,
        "seconds_per_edit": sum(seconds.values()),
        "median_seconds_per_edit": float(pd.Series(per_edit).median()),
        "seconds": seconds,
        "steps_per_call": sum(call["steps"] for call in outcome.times) / len(outcome.times),
        "failed_edits": sum(len(failure["case_ids"]) for failure in outcome.failed),
        "failures": outcome.failed,
        "evaluation_seconds": outcome.evaluation_seconds,
        "question_milliseconds": outcome.question_milliseconds,
        "gate": gate_shares(outcome.predictions),
        "bytes": outcome.bytes,
        "model_load_seconds": load_seconds,
        "peak_memory_bytes": peak_memory(),
        "threads": torch.get_num_threads(),
        **describe(model),
        "calls": outcome.times,
    }


def peak_memory() -> dict[str, int]:
    """Return the peak memory of the process, and of the GPU if there is one, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def record(
    outcome: Outcome,
    model: EditableModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    settings: CellSettings,
) -> dict[str, Any]:
    """Describe how a run was made, so that it can be made again."""
    hparams = plain(editor.hparams)
    if outcome.micro_batch:
        hparams["micro_batch"] = outcome.micro_batch
    return {
        "kmebench": __version__,
        "git_commit": git_commit(),
        "settings": dict(settings) | {"hparams": hparams},
        "requests": {"count": len(requests), "sha256": _digest(requests)},
        "model": describe(model),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """Return the commit of this code, with ``-dirty`` for local changes.

    None where it lies in no checkout, or where git is not installed.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(requests: Sequence[EditRequest]) -> str:
    return hashlib.sha256("\n".join(map(repr, requests)).encode()).hexdigest()
