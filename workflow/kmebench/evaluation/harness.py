"""A model on tasks of lm-evaluation-harness (Gao et al. 2024), an optional library of others."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmebench.errors import ConfigError
from kmebench.io.logs import doing
from kmebench.names import near_name

#: What of the harness's answer is kept.
_KEPT = ("results", "groups", "higher_is_better", "n-samples", "versions", "n-shot")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str  # with the harness's filter, if there is one: "exact_match, strict-match"
    value: float
    stderr: float | None
    documents: int | None  # None for a group of tasks


def check_installed() -> None:
    """Refuse to go on without the library.

    Raises:
        ConfigError: says how to install it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "kmebench evaluate needs lm-evaluation-harness: pip install 'kmebench[evaluate]'."
        )


def harness(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate the model of a Hugging Face folder; return what the harness found, as JSON holds it.

    ``tasks`` are names of its tasks, groups or tags, or of those in the folder ``include``.
    ``limit`` takes the first documents of each task alone.

    Raises:
        ConfigError: the library is missing, or a task is unknown or cannot be evaluated.
        ModelError: the folder holds no such model.
    """
    check_installed()
    from lm_eval import __version__, simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kmebench.models.editable import EditableModel

    manager = TaskManager(include_path=include)
    _check_tasks(tasks, manager.all_tasks)
    with doing(f"loading {folder}"):
        model = EditableModel.load(folder, dtype=dtype, device=device)
    lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
    try:
        with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # its bars
            found = simple_evaluate(
                lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
    except (OSError, ValueError) as error:  # no network, no such data
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"The tasks {', '.join(tasks)} cannot be evaluated ({why}); data of the hub are "
            "downloaded once, and need the network then."
        ) from error
    return {"harness": __version__, "limit": limit} | {key: found.get(key, {}) for key in _KEPT}


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a task that the harness does not know; it knows thousands."""
    for task in tasks:
        if task not in known:
            near = near_name(task, known)
            mend = f"did you mean {near!r}?" if near else "“lm-eval ls tasks” lists them."
            raise ConfigError(f"There is no task {task!r}; {mend}")


def scores(found: dict[str, Any]) -> list[TaskScore]:
    """Return the metrics of all tasks and groups, in the harness's order."""
    rows = []
    for task, values in (found["results"] | found["groups"]).items():
        count = found["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = f"{metric}, {kind}".removesuffix(", none")  # no filter
            stderr = error if isinstance(error, float) else None  # the harness says "N/A"
            rows.append(TaskScore(task, name, value, stderr, count))
    return rows
