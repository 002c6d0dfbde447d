"""Saved states of a run: resumed with the same bytes, never if damaged or of another run."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


#: What a checkpoint keeps of an outcome besides its predictions.
_KEPT = (
    *("times", "norms", "failed", "health", "bytes", "question_milliseconds"),
    *("evaluation_seconds", "micro_batch"),
)


class Checkpoints:
    """Saved states of a session: at most one, replaced as a whole.

    A checkpoint is a folder ``{edits done}`` (or epochs: ``unit``) with the masters of all
    touched weights, the overlays, the editor's memory and the state of the random generator
    (safetensors), the predictions so far (parquet) and a JSON record of the run's identity and of
    the files' checksums: a state of another configuration, or a damaged one, is never resumed.
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
        overlays = model.edits.overlays
        save_file(_packed(model.edits.state()), partial / "masters.safetensors")
        save_file(_packed(overlay_tensors(overlays)), partial / "overlays.safetensors")
        save_file(_packed(editor.state_dict()), partial / "editor.safetensors")
        save_file({"torch": torch.get_rng_state()}, partial / "random.safetensors")
        # One table takes a fraction of the memory of many small ones, and is joined faster.
        frames[:] = [pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()]
        frames[0].to_parquet(partial / "predictions.parquet")
        kept = {name: getattr(outcome, name) for name in _KEPT}
        sums = {file.name: sha256_of(file) for file in partial.iterdir()}
        kinds = overlay_kinds(overlays)
        facts = {"identity": self.identity, "overlays": kinds, "sha256": sums}
        write_json(partial / "record.json", kept | facts)
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
        return 0, [], Outcome()

    def _loaded(
        self, path: Path, done: int, record: dict[str, Any], model: EditableModel, editor: Editor
    ) -> tuple[int, list[pd.DataFrame], Outcome]:
        model.edits.load_state(load_file(path / "masters.safetensors"))
        overlays = load_file(path / "overlays.safetensors")
        model.apply(Edit(overlays=overlays_from(overlays, record["overlays"])))
        editor.load_state_dict(load_file(path / "editor.safetensors"))
        torch.set_rng_state(load_file(path / "random.safetensors")["torch"])
        frame = pd.read_parquet(path / "predictions.parquet")
        logger.info("resumed after %d %s", done, self.unit)
        kept = {name: record[name] for name in _KEPT}
        return done, [frame], Outcome(**kept)

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
