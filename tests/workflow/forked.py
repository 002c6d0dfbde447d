"""Snakemake without its start, which takes as long as the planning of a small grid.

It is forked from a process that has imported it and what it needs, but nothing of kmebench: each
checkout brings its own.
"""

import gc
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    ["snakemake.cli", "snakemake.executors.dryrun", "pandas", "pyarrow", "pydantic", "jsonschema"]
)
_ROOT = Path(__file__).parents[2]


def snakemake(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: Path
) -> int:
    """Run Snakemake in a folder, write what it says to a file, and return its exit status."""
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

    main(list(arguments))
