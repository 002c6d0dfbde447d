"""Editing sessions: the batch, the consecutive and the breadth-first pipeline.

**batch**: the requests are split into batches; each is edited at once from the original
model, evaluated, and rolled back. **consecutive**: one request after another without
rollback; predictions are made right after each edit ("write"), for all requests so far after
1, 3, 10, 30, 100, ... edits ("checkpoint"), and for all requests on the final model
("final"). The model's health is measured at "checkpoint" and "final".
**breadth_first**: all requests at once, without rollback; the editor passes over them in
mini-batches, several times, and the final model is evaluated.

Sessions save their state (after every batch; every few edits; every epoch, which the name of a
breadth-first checkpoint counts) and resume from it with the same bytes. Asked to stop by SIGTERM
or SIGUSR1, they finish the edit or epoch under way, save, and end.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Stopwatch
from kmebench.editors.epochs import EpochEditor
from kmebench.edits.weights import WeightDelta
from kmebench.errors import EditError, ModelError
from kmebench.evaluation.frames import predicted_frame
from kmebench.evaluation.predict import Settings
from kmebench.evaluation.prompts import prompts_of
from kmebench.io.files import sha256_of, write_json
from kmebench.io.logs import track
from kmebench.memory import NoMemoryError, halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.pipelines.preemption import PreemptedError, noted_signals

logger = logging.getLogger("kmebench")

#: Measures the model as it is now (kmebench.evaluation.health).
Measure = Callable[[EditableModel], Mapping[str, float]]


@dataclass
class Outcome:
    """What a session produced.

    ``predictions``: one row per prompt and moment, "after" columns only. ``times``: one entry
    per call of the editor: requests, seconds by name, steps. ``delta``: everything that was
    changed (None for batches, which are rolled back). ``norms``: Frobenius
    norm of every touched parameter, for each call of the editor. ``failed``: case_ids and error of
    each call that was skipped; its requests are asked of the model without it.
    ``health``: edits_done and the measurements of each model state that was measured.
    ``evaluation_seconds``: what all predictions and measurements of the run took.
    """

    predictions: pd.DataFrame
    times: list[dict[str, Any]] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    health: list[dict[str, float]] = field(default_factory=list)
    evaluation_seconds: float = 0.0
    delta: WeightDelta | None = None


def run_batches(
    model: EditableModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    batch_size: int,
    settings: Settings,
    checkpoints: "Checkpoints",
    *,
    skip_failed: bool = False,
) -> Outcome:
    """Edit batch after batch, each from the original model, resuming behind the last one saved."""
    done, frames, outcome = checkpoints.restore(model, editor)
    starts = range(done, len(requests), batch_size)
    with noted_signals() as stopped_by:
        for start in track(starts, "batches edited", len(starts)):
            batch, number = requests[start : start + batch_size], start // batch_size
            _edit(model, editor, batch, outcome, skip_failed)
            with _finished(model, editor, outcome):
                frames.append(
                    _predictions(
                        model,
                        outcome,
                        batch,
                        start,
                        settings,
                        "final",
                        len(batch),
                        number,
                        decode=True,
                    )
                )
            model.revert()
            # An independent run starts without memory of the batch before.
            editor.load_state_dict({})
            done = start + len(batch)
            if done < len(requests):
                checkpoints.save(model, editor, done, frames, outcome, stopped_by())
    outcome.predictions = pd.concat(frames, ignore_index=True)
    return outcome


def run_consecutive(
    model: EditableModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    settings: Settings,
    checkpoints: "Checkpoints",
    *,
    skip_failed: bool = False,
    measure: Measure | None = None,
) -> Outcome:
    """Edit one request after another, resuming from the newest checkpoint."""
    done, frames, outcome = checkpoints.restore(model, editor)
    remaining = requests[done:]
    with noted_signals() as stopped_by:
        for request in track(remaining, "requests edited", len(remaining)):
            _edit(model, editor, [request], outcome, skip_failed)
            done += 1
            frames.append(
                _predictions(model, outcome, [request], done - 1, settings, "write", done)
            )
            if done in milestones(len(requests)):
                with _finished(model, editor):
                    so_far = requests[:done]
                    frames.append(
                        _predictions(model, outcome, so_far, 0, settings, "checkpoint", done)
                    )
                    _measure(model, outcome, done, measure)
            if done % checkpoints.every == 0 or stopped_by():
                checkpoints.save(model, editor, done, frames, outcome, stopped_by())
    with _finished(model, editor, outcome):
        frames.append(
            _predictions(model, outcome, requests, 0, settings, "final", len(requests), decode=True)
        )
        _measure(model, outcome, len(requests), measure)
        outcome.delta = model.edits.total()
    outcome.predictions = pd.concat(frames, ignore_index=True)
    return outcome


def run_breadth_first(
    model: EditableModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    settings: Settings,
    checkpoints: "Checkpoints",
    *,
    skip_failed: bool = False,
    measure: Measure | None = None,
) -> Outcome:
    """Edit all requests in one call, without rollback, resuming behind the last epoch saved."""
    _, _, outcome = checkpoints.restore(model, editor)
    if isinstance(editor, EpochEditor):
        with noted_signals() as stopped_by:
            editor.after_epoch = lambda epochs: checkpoints.save(
                model, editor, epochs, [], outcome, stopped_by()
            )
            _edit(model, editor, requests, outcome, skip_failed)
    else:
        _edit(model, editor, requests, outcome, skip_failed)
    with _finished(model, editor, outcome):
        outcome.predictions = _predictions(
            model, outcome, requests, 0, settings, "final", len(requests), decode=True
        )
        _measure(model, outcome, len(requests), measure)
        outcome.delta = model.edits.total()
    return outcome


def milestones(n: int) -> set[int]:
    """Return 1, 3, 10, 30, 100, ... below ``n``: the edits after which all so far are scored."""
    values: set[int] = set()
    power = 1
    while power < n:
        values |= {power, 3 * power}
        power *= 10
    return {value for value in values if value < n}


def _edit(
    model: EditableModel,
    editor: Editor,
    batch: Sequence[EditRequest],
    outcome: Outcome,
    skip_failed: bool,
) -> None:
    """Edit, apply, and note how long it took; a failed edit changes neither model nor editor."""
    memory = editor.state_dict()
    try:
        delta = _checked_delta(model, editor, batch)
    except EditError as error:
        if not skip_failed:
            raise
        logger.warning("skipped: %s", error)
        editor.load_state_dict(memory)
        outcome.failed.append({"case_ids": [r.case_id for r in batch], "error": str(error)})
        delta = WeightDelta({})
    with editor.stopwatch("apply"):
        model.apply(delta)
    outcome.times.append(
        {"requests": len(batch), "steps": editor.steps, "seconds": editor.stopwatch.seconds}
    )
    outcome.norms.append(delta.norms())


def _checked_delta(
    model: EditableModel, editor: Editor, batch: Sequence[EditRequest]
) -> WeightDelta:
    """Call the editor; every failure of an edit names its requests."""
    who = f"request {batch[0].case_id!r} (batch of {len(batch)})"
    memory, random = editor.state_dict(), torch.get_rng_state()

    def edit(micro_batch: int) -> WeightDelta:
        editor.stopwatch, editor.steps = Stopwatch(), 0
        editor.load_state_dict(memory)
        torch.set_rng_state(random)
        if micro_batch != whole:  # for the rest of the run, whose record will say so
            editor.hparams = replace(editor.hparams, micro_batch=micro_batch)
        return editor.edit(model, batch)

    whole = getattr(editor.hparams, "micro_batch", 1)
    try:
        mend = "lower micro_batch or batch_size, or choose a smaller dtype"
        delta = halved_if_needed(edit, whole, f"editing {who}", mend)
    except NoMemoryError as error:
        raise EditError(str(error)) from error
    except ModelError as error:  # a text that the model cannot be given
        raise EditError(f"Cannot edit {who}: {error}") from error
    if not delta.is_finite():
        raise EditError(f"The edit of {who} holds NaN or infinite values; lower the learning rate.")
    return delta


@contextmanager
def _finished(
    model: EditableModel, editor: Editor, outcome: Outcome | None = None
) -> Iterator[None]:
    """Carry what the editor adds at the end of a run while the block runs.

    With ``outcome`` the run does end, and the time is noted in the last call of the editor.
    """
    stopwatch = Stopwatch()
    with stopwatch("finish"):
        last = editor.finish(model)
    if not last:
        yield
        return
    before = {name: masters.clone() for name, masters in model.edits.state().items()}
    with stopwatch("finish"):
        model.apply(last)
    if outcome is not None:
        outcome.times[-1]["seconds"] |= stopwatch.seconds
    yield
    model.revert()  # the end may touch weights that no edit did
    model.edits.load_state(before)


def _predictions(
    model: EditableModel,
    outcome: Outcome,
    requests: Sequence[EditRequest],
    first: int,
    settings: Settings,
    moment: str,
    edits_done: int,
    batch: int = 0,
    *,
    decode: bool = False,
) -> pd.DataFrame:
    """Predict all prompts of ``requests``, the first of which has the position ``first``."""
    prompts = [p for i, r in enumerate(requests, start=first) for p in prompts_of(r, i)]
    started = time.perf_counter()
    frame = predicted_frame(model, prompts, settings, decode=decode)
    outcome.evaluation_seconds += time.perf_counter() - started
    return frame.assign(moment=moment, edits_done=edits_done, batch=batch)


def _measure(
    model: EditableModel, outcome: Outcome, edits_done: int, measure: Measure | None
) -> None:
    """Note the health of the model as it is now; its time is no edit's."""
    if measure:
        started = time.perf_counter()
        outcome.health.append({"edits_done": edits_done, **measure(model)})
        outcome.evaluation_seconds += time.perf_counter() - started


#: What a checkpoint keeps of an outcome besides its predictions.
_KEPT = ("times", "norms", "failed", "health", "evaluation_seconds")


class Checkpoints:
    """Saved states of a session: at most one, replaced as a whole.

    A checkpoint is a folder ``{edits done}`` (or epochs: ``unit``) with the masters of all
    touched weights, the editor's memory and the state of the random generator (safetensors), the
    predictions so far (parquet) and a JSON record of the run's identity and of the files'
    checksums: a state of another configuration, or a damaged one, is never resumed.
    """

    def __init__(
        self, folder: Path, every: int, identity: dict[str, Any], unit: str = "edits"
    ) -> None:
        self.folder, self.every, self.identity, self.unit = folder, every, identity, unit

    def save(
        self,
        model: EditableModel,
        editor: Editor,
        done: int,
        frames: list[pd.DataFrame],
        outcome: Outcome,
        stopped_by: str | None = None,
    ) -> None:
        """Write a checkpoint; it appears under its name only when complete. Joins ``frames``.

        Raises:
            PreemptedError: it was written because of a signal, named by ``stopped_by``.
        """
        target, partial = self.folder / str(done), self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_packed(model.edits.state()), partial / "masters.safetensors")
        save_file(_packed(editor.state_dict()), partial / "editor.safetensors")
        save_file({"torch": torch.get_rng_state()}, partial / "random.safetensors")
        # One table takes a fraction of the memory of many small ones, and is joined faster.
        frames[:] = [pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()]
        frames[0].to_parquet(partial / "predictions.parquet")
        kept = {name: getattr(outcome, name) for name in _KEPT}
        sums = {file.name: sha256_of(file) for file in partial.iterdir()}
        write_json(partial / "record.json", kept | {"identity": self.identity, "sha256": sums})
        older = list(self._complete())
        partial.rename(target)
        for _, path in older:
            shutil.rmtree(path)
        logger.info("checkpoint after %d %s", done, self.unit)
        if stopped_by:
            raise PreemptedError(
                f"Stopped by {stopped_by} after {done} {self.unit}, which are saved in {target}: "
                "the same command goes on from there."
            )

    def restore(
        self, model: EditableModel, editor: Editor
    ) -> tuple[int, list[pd.DataFrame], Outcome]:
        """Load the newest checkpoint into a freshly loaded model; (0, [], empty) without one.

        One that is damaged, or of another configuration, is deleted.
        """
        for done, path in sorted(self._complete(), reverse=True):
            record = _intact_record(path)
            if record is None:
                logger.warning("the checkpoint %s is damaged: deleting it", path)
            elif record["identity"] != self.identity:
                logger.info("the checkpoint %s is of another configuration: deleting it", path)
            else:
                return self._loaded(path, done, record, model, editor)
            shutil.rmtree(path)
        return 0, [], Outcome(pd.DataFrame())

    def _loaded(
        self, path: Path, done: int, record: dict[str, Any], model: EditableModel, editor: Editor
    ) -> tuple[int, list[pd.DataFrame], Outcome]:
        model.edits.load_state(load_file(path / "masters.safetensors"))
        editor.load_state_dict(load_file(path / "editor.safetensors"))
        torch.set_rng_state(load_file(path / "random.safetensors")["torch"])
        frame = pd.read_parquet(path / "predictions.parquet")
        logger.info("resumed after %d %s", done, self.unit)
        kept = {name: record[name] for name in _KEPT}
        return done, [frame], Outcome(pd.DataFrame(), **kept)

    def clear(self) -> None:
        """Remove all checkpoints (the run is complete)."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> Iterator[tuple[int, Path]]:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.isdecimal():
                    yield int(path.name), path


def _intact_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint, or None unless all its files are what was written."""
    try:
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        intact = all(sha256_of(path / name) == was for name, was in record["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if intact else None


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
