"""Snakemake without its start, which takes as long as the planning of a small grid.

It is forked from a process that has imported it and what it needs, but nothing of kmebench: each
checkout brings its own.
"""

import gc
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    [
        *("snakemake.cli", "snakemake.executors.dryrun", "snakemake.executors.local"),
        *("snakemake.report.html_reporter", "snakemake.profiles", "smart_open", "dpath", "yte"),
        *("pandas", "pyarrow", "pydantic.dataclasses", "jsonschema", "jinja2", "safetensors"),
    ]
)
_ROOT = Path(__file__).parents[2]


def snakemake(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: Path
) -> int:
    """Run Snakemake in a folder, write what it says to a file, and return its exit status.

    Beside that file, ``jobs.jsonl`` has a line for each job that it plans or starts, in order.
    """
    process = _fork.Process(target=_snakemake, args=(arguments, folder, environment, output))
    process.start()
    process.join()
    return process.exitcode


def _snakemake(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: Path
) -> None:
    gc.freeze()
    with output.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    of_tests = {str(_ROOT), str(_ROOT / "workflow")}
    others = (path for path in sys.path if path not in of_tests)
    sys.path[:] = [*environment["PYTHONPATH"].split(os.pathsep), *others]
    sys.argv[:] = ["snakemake", *arguments]
    from snakemake.cli import main
    from snakemake.logging import logger

    with output.with_name("jobs.jsonl").open("w", encoding="utf-8") as jobs:
        logger.addFilter(_Jobs(jobs).write)
        main(list(arguments))


class _Jobs:
    """What Snakemake tells its log of a job: more than it prints."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, record: logging.LogRecord) -> bool:
        """Write the record if it is one of a job; it is logged all the same."""
        if hasattr(record, "reason"):
            job = {name: getattr(record, name) for name in ("rule_name", "input", "output")}
            # Snakemake adds what a path is flagged as: "file (update)".
            job["output"] = [path.partition(" (")[0] for path in job["output"]]
            job["gpu"] = record.resources.get("gpu")
            print(json.dumps(job), file=self.stream, flush=True)
        return True
