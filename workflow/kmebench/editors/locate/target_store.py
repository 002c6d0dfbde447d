"""Targets as a cached stage: z* of every request on the unedited model, shared by MEMIT's family.

In batch mode every batch is edited from the original model, and the targets of its requests do not
depend on each other. So they are optimised once for all editors and batch sizes with the same layer
and loss.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import MEMIT_LENGTHS, Contexts, prefixes, sample_contexts
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.errors import EditError, KMEBenchError, ModelError
from kmebench.io.parts import Parts
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import SubjectText

logger = logging.getLogger("kmebench")

_FORMAT = "kmebench.targets.v3"
_REQUESTS_AT_ONCE = 100


def cache_targets(
    parts: Parts,
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: TargetSettings,
) -> None:
    """Optimise the targets of all requests and write them, going on behind ``parts``.

    Why a request has no target is noted: the stage does not know whether runs are to skip it.

    Raises:
        NoMemoryError: half of ``micro_batch`` requests at once do not fit.
    """
    start = time.perf_counter()
    contexts = sample_contexts(model, MEMIT_LENGTHS, seed=0)
    sampling = time.perf_counter() - start
    whole = replace(settings, keep_failed=True)

    def write(path: Path, items: slice) -> None:
        start = time.perf_counter()
        failed = _unreadable(model, requests[items], contexts)
        able = [request for request in requests[items] if request.case_id not in failed]
        tensors = {"values": torch.empty(0), "steps": torch.empty(0, dtype=torch.long)}
        if able:
            targets = halved_if_needed(
                lambda size: optimise_targets(
                    model, able, contexts, replace(whole, micro_batch=size), "targets"
                ),
                whole.micro_batch,
                "optimising targets",
                "choose a smaller dtype",
            )
            tensors = {"values": targets.values, "steps": targets.steps}
            failed |= targets.failed
        facts = {
            "case_ids": [request.case_id for request in able],
            "failed": failed,
            "seconds": time.perf_counter() - start,
        }
        write_tensors(path, tensors, _FORMAT, facts)

    written = parts.files(len(requests), _REQUESTS_AT_ONCE, write, "parts of the targets")
    files = [TensorFile.open(path, _FORMAT) for path in written]
    tensors = {name: torch.cat([f.tensor(name) for f in files]) for name in ("values", "steps")}
    facts = {
        "case_ids": [case_id for file in files for case_id in file.facts["case_ids"]],
        "failed": {name: why for file in files for name, why in file.facts["failed"].items()},
        "seconds_per_request": (sampling + sum(file.facts["seconds"] for file in files))
        / len(requests),
    }
    write_tensors(parts.path, tensors, _FORMAT, facts)
    parts.clear()


def _unreadable(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Contexts
) -> dict[str, str]:
    """Say by case_id why the model cannot be given some requests."""
    failed = {}
    for request in requests:
        texts = [
            SubjectText.of(request, before, request.target_new) for before in prefixes(contexts)
        ]
        try:
            model.encode_subjects(texts)
        except ModelError as error:
            failed[request.case_id] = f"Cannot edit request {request.case_id!r}: {error}"
            logger.warning(failed[request.case_id])
    return failed


@dataclass(frozen=True)
class StoredTargets:
    """The targets of some requests, in the order asked for."""

    values: Tensor  # [B, D] float32
    steps: Tensor  # [B]
    seconds: float  # spent on all B


def stored_targets(path: str | Path, case_ids: Sequence[str]) -> StoredTargets:
    """Read the targets of ``case_ids``.

    Raises:
        EditError: a request has none; says why.
        KMEBenchError: the file is no target file or damaged, or a request is not in it.
    """
    file = TensorFile.open(path, _FORMAT)
    for case_id in case_ids:
        if why := file.facts["failed"].get(case_id):
            raise EditError(why)
    rows = {case_id: row for row, case_id in enumerate(file.facts["case_ids"])}
    missing = [case_id for case_id in case_ids if case_id not in rows]
    if missing:
        raise KMEBenchError(
            f"{path} holds no target for request {missing[0]!r}; it was made from other data: "
            "delete it and run the workflow again."
        )
    chosen = torch.tensor([rows[case_id] for case_id in case_ids])
    values, steps = file.tensor("values")[chosen], file.tensor("steps")[chosen]
    return StoredTargets(values, steps, file.facts["seconds_per_request"] * len(case_ids))
