"""Targets as a cached stage: z* of every request on the unedited model, shared by MEMIT's family.

In batch mode every batch is edited from the original model, and the targets of its requests do not
depend on each other. So they are optimised once for all editors and batch sizes with the same layer
and loss.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import MEMIT_LENGTHS, sample_contexts
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.errors import KMEBenchError
from kmebench.io.parts import Parts
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel

_FORMAT = "kmebench.targets.v2"
_REQUESTS_AT_ONCE = 100


def cache_targets(
    parts: Parts,
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: Mapping[str, Any],
) -> None:
    """Optimise the targets of all requests and write them, going on behind ``parts``.

    ``settings``: fields of :class:`TargetSettings`.

    Raises:
        EditError: a target becomes NaN or infinite.
        NoMemoryError: half of ``micro_batch`` requests at once do not fit.
    """
    start = time.perf_counter()
    contexts = sample_contexts(model, MEMIT_LENGTHS, seed=0)
    sampling = time.perf_counter() - start
    whole = TargetSettings(**settings)

    def write(path: Path, items: slice) -> None:
        start = time.perf_counter()
        targets = halved_if_needed(
            lambda size: optimise_targets(
                model, requests[items], contexts, replace(whole, micro_batch=size), "targets"
            ),
            whole.micro_batch,
            "optimising targets",
            "lower micro_batch, or choose a smaller dtype",
        )
        facts = {"seconds": time.perf_counter() - start}
        write_tensors(path, {"values": targets.values, "steps": targets.steps}, _FORMAT, facts)

    written = parts.files(len(requests), _REQUESTS_AT_ONCE, write, "parts of the targets")
    files = [TensorFile.open(path, _FORMAT) for path in written]
    tensors = {name: torch.cat([f.tensor(name) for f in files]) for name in ("values", "steps")}
    seconds = (sampling + sum(file.facts["seconds"] for file in files)) / len(requests)
    facts = {"case_ids": [r.case_id for r in requests], "seconds_per_request": seconds}
    write_tensors(parts.path, tensors, _FORMAT, facts)
    parts.clear()


@dataclass(frozen=True)
class StoredTargets:
    """The targets of some requests, in the order asked for."""

    values: Tensor  # [B, D] float32
    steps: Tensor  # [B]
    seconds: float  # spent on all B


def stored_targets(path: str | Path, case_ids: Sequence[str]) -> StoredTargets:
    """Read the targets of ``case_ids``.

    Raises:
        KMEBenchError: the file is no target file or damaged, or a request is not in it.
    """
    file = TensorFile.open(path, _FORMAT)
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
