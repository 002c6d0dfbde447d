"""One update of an optimiser: its time, and its profile (kernels, launches, gaps)."""

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

#: Categories of a trace's events that are the GPU's own work.
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
#: Updates before the one that is profiled: the first holds what comes before it, one warms up.
BEFORE = 2
LONGEST_NAME = 120


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def after_each_update(call: Callable[[], object]) -> Iterator[None]:
    """Call when an optimiser has updated its parameters, and the GPU is done."""

    def waited(*_: Any) -> None:
        synchronize()
        call()

    handle = register_optimizer_step_post_hook(waited)
    try:
        yield
    finally:
        handle.remove()


def update_seconds(run: Callable[[], object]) -> float:
    """Return the median time between two updates of ``run``, which makes two at least."""
    stamps: list[float] = []
    with after_each_update(lambda: stamps.append(time.perf_counter())):
        run()
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


def profiled_update(run: Callable[[], object]) -> dict[str, Any]:
    """Return the :func:`summary` of one update of ``run``, which makes three at least."""
    found: list[Mapping[str, Any]] = []

    def keep(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            found.extend(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])

    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with (
        profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=BEFORE - 1, warmup=1, active=1, repeat=1),
            on_trace_ready=keep,
        ) as profiler,
        after_each_update(profiler.step),
    ):
        run()
    return summary(found)


def summary(events: Sequence[Mapping[str, Any]], top: int = 25) -> dict[str, Any]:
    """Sum up the events of a Chrome trace (times in microseconds) with one ``ProfilerStep``.

    ``kernels`` are the GPU's; without one, those operators of the CPU that call no other. Gaps are
    the times between two kernels in which none runs; ``busy_share`` is of the whole step.
    """
    timed = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
    step = next(
        e
        for e in timed
        if e["name"].startswith("ProfilerStep") and e.get("cat") == "user_annotation"
    )
    kernels = [e for e in timed if e.get("cat") in ON_GPU]
    kernels, where = (kernels, "gpu") if kernels else (_leaves(timed), "cpu")
    busy, gaps = _busy_and_gaps(kernels)
    calls = Counter(e["name"] for e in timed if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[event["name"]] += event["dur"]
    times = Counter(e["name"] for e in kernels)
    return {
        "of": where,
        "step_seconds": step["dur"] / 1e6,
        "busy_share": busy / step["dur"],
        "kernels": len(kernels),
        "kernel_seconds": sum(spent.values()) / 1e6,
        "launches": sum(n for name, n in calls.items() if "Launch" in name),
        "gaps": len(gaps),
        "gap_seconds": sum(gaps) / 1e6,
        "median_gap_seconds": statistics.median(gaps or [0.0]) / 1e6,
        "longest_gap_seconds": max(gaps, default=0.0) / 1e6,
        "runtime_calls": dict(calls.most_common(12)),
        "top": [
            {"name": name[:LONGEST_NAME], "seconds": us / 1e6, "times": times[name]}
            for name, us in spent.most_common(top)
        ],
    }


def _leaves(timed: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the operators of the CPU inside which no other begins."""
    leaves = []
    for thread in {e["tid"] for e in timed if e.get("cat") == "cpu_op"}:
        own = [e for e in timed if e.get("cat") == "cpu_op" and e["tid"] == thread]
        pairs = itertools.zip_longest(own, own[1:])
        leaves += [e for e, after in pairs if not after or after["ts"] >= e["ts"] + e["dur"]]
    return sorted(leaves, key=lambda e: e["ts"])


def _busy_and_gaps(kernels: Sequence[Mapping[str, Any]]) -> tuple[float, list[float]]:
    """Return the time in which any kernel runs, and the gaps between; kernels by their start."""
    busy, gaps, until = 0.0, [], None
    for event in kernels:
        start, end = event["ts"], event["ts"] + event["dur"]
        if until is not None and start > until:
            gaps.append(start - until)
        begin = start if until is None else max(start, until)
        busy += max(0.0, end - begin)
        until = end if until is None else max(until, end)
    return busy, gaps
