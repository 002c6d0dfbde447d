"""Saved states of a run: resumed with the same bytes, never if damaged or of another run."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kmebench.editors.base import Editor
from kmebench.edits.edit import Edit, overlay_kinds, overlay_tensors, overlays_from
from kmebench.io.files import sha256_of, write_json
from kmebench.models.editable import EditableModel
from kmebench.preemption import PreemptedError

logger = logging.getLogger("kmebench")


@dataclass
class Outcome:
    """What a run produced.

    ``predictions``: one row per prompt and time of asking, "after" columns only. ``times``: one
    entry per call of the editor: requests, seconds by name, steps. ``edit``: everything that was
    changed (None for batches, which are rolled back). ``norms``: Frobenius
    norm of every touched parameter, for each call of the editor. ``failed``: case_ids and error of
    each call that was skipped; its requests are asked of the model without it.
    ``health``: edits_done and the measurements of every model that was measured, and ``change``:
    Frobenius and spectral norm of what all edits together changed, by parameter.
    ``bytes``: edits_done and what these have left; ``question_milliseconds``: what a question costs
    before and after (kmebench.pipelines.footprint).
    ``evaluation_seconds``: what all predictions and measurements of the run took. ``micro_batch``:
    how many requests the editor passes through the model at once since memory did not suffice for
    its own number.
    """

    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    times: list[dict[str, Any]] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    health: list[dict[str, Any]] = field(default_factory=list)
    bytes: list[dict[str, int]] = field(default_factory=list)
    question_milliseconds: dict[str, float] = field(default_factory=dict)
    evaluation_seconds: float = 0.0
    micro_batch: int | None = None
    edit: Edit | None = None


def norms_frame(outcome: Outcome) -> pd.DataFrame:
    """Return a row for each parameter that a call of the editor changed (schema ``NORMS``)."""
    changed = np.array([len(norms) for norms in outcome.norms], np.int64)
    columns = {
        "call": np.repeat(np.arange(len(changed)), changed),
        "requests": np.repeat([call["requests"] for call in outcome.times], changed),
        "parameter": [name for norms in outcome.norms for name in norms],
        "norm": np.array([norm for norms in outcome.norms for norm in norms.values()], np.float64),
    }
    return pd.DataFrame(columns)


def _norms(frame: pd.DataFrame, calls: int) -> list[dict[str, float]]:
    """Read :func:`norms_frame` back; a call may have changed nothing."""
    norms: list[dict[str, float]] = [{} for _ in range(calls)]
    for call, parameter, norm in zip(frame["call"], frame["parameter"], frame["norm"], strict=True):
        norms[call][parameter] = norm
    return norms


#: What a checkpoint keeps of an outcome as JSON; predictions and norms are tables.
_KEPT = (
    *("times", "failed", "health", "bytes", "question_milliseconds"),
    *("evaluation_seconds", "micro_batch"),
)


class _State(NamedTuple):
    done: int
    path: Path
    record: dict[str, Any]


#: Of a state, or of one that was set aside.
_NAME = re.compile(r"(?P<aside>set-aside-)?(?P<done>\d+)(?(aside)-[0-9a-f]{8})")


class Checkpoints:
    """Saved states of a session: at most one, replaced as a whole.

    A checkpoint is a folder ``{edits done}`` (or epochs: ``unit``) with the masters of all
    touched weights, the overlays, the editor's memory and the state of the random generator
    (safetensors), the predictions and norms so far (parquet), the rest of the outcome and a record
    of the run's identity and of the files' checksums (JSON). Norms are float64, as in memory: the
    file of a run that was resumed rounds the same numbers.

    A damaged state is deleted. One of another identity is renamed to ``set-aside-{edits done}-...``
    and goes on if its configuration comes back, even after the run. One is kept so: of two that
    with more edits, which costs more to make again.
    """

    def __init__(
        self, folder: Path, every: int, identity: dict[str, Any], unit: str = "edits"
    ) -> None:
        self.folder, self.every, self.unit = folder, every, unit
        self.identity = json.loads(json.dumps(identity))  # as it is read back

    def save(
        self,
        model: EditableModel,
        editor: Editor,
        done: int,
        frames: list[pd.DataFrame],
        outcome: Outcome,
        stopped_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Write a checkpoint; it appears under its name only when complete. Joins ``frames``.

        Raises:
            PreemptedError: a signal has come by then, which ``stopped_by`` names.
        """
        target, partial = self.folder / str(done), self.folder / "partial"
        replaced = self.folder / "replaced"
        for left in (partial, replaced):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        overlays = model.edits.overlays
        save_file(_packed(model.edits.state()), partial / "masters.safetensors")
        save_file(_packed(overlay_tensors(overlays)), partial / "overlays.safetensors")
        save_file(_packed(editor.state_dict()), partial / "editor.safetensors")
        save_file({"torch": torch.get_rng_state()}, partial / "random.safetensors")
        # One table takes a fraction of the memory of many small ones, and is joined faster.
        frames[:] = [pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()]
        frames[0].to_parquet(partial / "predictions.parquet")
        norms_frame(outcome).to_parquet(partial / "norms.parquet")
        # Compact, since it grows with the run.
        kept = json.dumps({name: getattr(outcome, name) for name in _KEPT}, separators=(",", ":"))
        (partial / "outcome.json").write_text(kept, encoding="utf-8")
        sums = {file.name: sha256_of(file) for file in partial.iterdir()}
        kinds = overlay_kinds(overlays)
        facts = {"identity": self.identity, "overlays": kinds, "sha256": sums}
        write_json(partial / "record.json", facts)
        older = [path for _, path in self._states() if path.name.isdecimal()]
        if target in older:  # of a try that memory did not suffice for
            older[older.index(target)] = target.rename(replaced)
        partial.rename(target)
        for path in older:
            shutil.rmtree(path)
        logger.info("checkpoint after %d %s", done, self.unit)
        if name := stopped_by():
            raise self.stopped(name, done)

    def stopped(self, signal: str, done: int) -> PreemptedError:
        """Say that a signal has ended a run whose ``done`` edits or epochs are saved."""
        return PreemptedError(
            f"Stopped by {signal} after {done} {self.unit}, which are saved in "
            f"{self.folder / str(done)}: the same command goes on from there."
        )

    def restore(
        self, model: EditableModel, editor: Editor
    ) -> tuple[int, list[pd.DataFrame], Outcome]:
        """Load the newest checkpoint into a freshly loaded model; (0, [], empty) without one.

        One that is damaged is deleted, one of another configuration is set aside.

        Raises:
            OSError: one cannot be read; it stays.
        """
        fitting: list[_State] = []
        foreign: list[_State] = []
        for done, path in sorted(self._states(), reverse=True):
            record = _intact_record(path)
            if record is None:
                logger.warning("the checkpoint %s is damaged: deleting it", path)
                shutil.rmtree(path)
            else:
                differ = _differing(record["identity"], self.identity)
                (foreign if differ else fitting).append(_State(done, path, record))
        self._set_aside(foreign)
        if not fitting:
            return 0, [], Outcome()
        newest, *superseded = fitting
        for state in superseded:  # a kill came before it was removed
            shutil.rmtree(state.path)
        return self._loaded(newest, model, editor)

    def _set_aside(self, foreign: list[_State]) -> None:
        """Keep the first of the states of other configurations, under a name that says so."""
        for state in foreign[1:]:
            logger.warning("deleting %s: of other configurations one is kept", state.path)
            shutil.rmtree(state.path)
        for state in foreign[:1]:
            identity = state.record["identity"]
            aside = self.folder / f"set-aside-{state.done}-{_digest(identity)}"
            state.path.rename(aside)
            logger.warning(
                "the checkpoint %s is of another configuration (%s differ) and stays: "
                "with that a run goes on from there; else delete it",
                aside,
                ", ".join(_differing(identity, self.identity)),
            )

    def _loaded(
        self, state: _State, model: EditableModel, editor: Editor
    ) -> tuple[int, list[pd.DataFrame], Outcome]:
        done, record = state.done, state.record
        path = state.path.rename(self.folder / str(done))  # it may have been set aside
        model.edits.load_state(load_file(path / "masters.safetensors"))
        overlays = load_file(path / "overlays.safetensors")
        model.apply(Edit(overlays=overlays_from(overlays, record["overlays"])))
        editor.load_state_dict(load_file(path / "editor.safetensors"))
        torch.set_rng_state(load_file(path / "random.safetensors")["torch"])
        frame = pd.read_parquet(path / "predictions.parquet")
        logger.info("resumed after %d %s", done, self.unit)
        kept = json.loads((path / "outcome.json").read_text(encoding="utf-8"))
        norms = _norms(pd.read_parquet(path / "norms.parquet"), len(kept["times"]))
        return done, [frame], Outcome(**kept, norms=norms)

    def clear(self) -> None:
        """Remove the states of this run, which is complete; what was set aside stays."""
        aside = [path for _, path in self._states() if not path.name.isdecimal()]
        if not aside:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in set(self.folder.iterdir()).difference(aside):
            shutil.rmtree(path)

    def _states(self) -> Iterator[tuple[int, Path]]:
        """Yield complete states and how many edits they hold; those set aside, too."""
        with suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                if name := _NAME.fullmatch(path.name):
                    yield int(name["done"]), path


def _intact_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint, or None unless all its files are what was written.

    Raises:
        OSError: a file is there and cannot be read (a network file system that is away).
    """
    try:
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        intact = all(sha256_of(path / name) == was for name, was in record["sha256"].items())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return record if intact else None


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Name the keys whose values differ, e.g. ``settings.hparams.micro_batch``."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [key]
    return [
        found
        for name in sorted(one.keys() | other.keys())
        for found in _differing(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    ]
