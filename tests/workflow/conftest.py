"""A copy of the workflow in an empty folder, run as a user would.

A test that asks for a finished run is one of ``integration``: `make quick` leaves it out.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from filelock import FileLock

from tests.workflow import forked

ROOT = Path(__file__).parents[2]
PARTS = (
    "Snakefile",
    "config.yaml",
    "config",
    "workflow",
    "profiles",
    "resources",
    "envs",
    "notebooks",
)


#: Facts of each relation in a checkout: text enough for second moments of full rank, and so few
#: that tiny-gptj knows them after 15 seconds of training (all of them: after two minutes).
FACTS = 16


def pytest_collection_modifyitems(items):
    """Begin with the finished run, then with the slow tests, those first that need no such run.

    So no other process waits for it while it trains its model, and none is idle in the end.
    """
    using = {item for item in items if "finished" in getattr(item, "fixturenames", ())}
    for item in using:
        item.add_marker("integration")
    slow = {item for item in items if item.get_closest_marker("slow")}
    first = [item for item in items if item in using - slow][:1]
    items.sort(key=lambda item: (item not in first, item not in slow, item in using & slow))


class Checkout:
    """One checkout with its own results, and fewer facts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in PARTS:
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, folder / part)
        for table in (folder / "resources/openfacts/facts").glob("*.csv"):
            header, *facts = table.read_text(encoding="utf-8").splitlines(keepends=True)
            table.write_text("".join([header, *facts[:FACTS]]), encoding="utf-8")

    def overlay(self, name: str, **config) -> str:
        """Write a config overlay."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path.name

    def command(self, *arguments: str, configs=("config/ci.yaml",)) -> list[str]:
        snakemake = [sys.executable, "-m", "snakemake"]
        return [*snakemake, *self.words(*arguments, configs=configs)]

    def words(self, *arguments: str, configs=("config/ci.yaml",)) -> list[str]:
        return ["--cores", "2", *arguments, "--configfile", *configs]

    def environment(self, **variables) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k != "KMEBENCH_DATA_MIRROR"}
        # The library of this checkout, and not one that is installed from another.
        path = [str(self.folder / "workflow"), variables.pop("PYTHONPATH", "")]
        return inherited | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | variables

    def run(self, *arguments: str, configs=("config/ci.yaml",), check=True, **variables) -> str:
        said = self.folder / "output.txt"
        words, environment = self.words(*arguments, configs=configs), self.environment(**variables)
        succeeded = forked.snakemake(words, self.folder, environment, said) == 0
        output = said.read_text(encoding="utf-8")
        assert succeeded == check, output
        return output

    def start(self, *arguments: str, configs=("config/ci.yaml",)) -> subprocess.Popen:
        """Start a run that says nothing, in a process group of its own."""
        return subprocess.Popen(
            self.command(*arguments, configs=configs),
            cwd=self.folder,
            env=self.environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def planned(self, *arguments: str, configs=("config/ci.yaml",)) -> dict[str, int]:
        """Return rule -> number of jobs of a dry run (without ``all`` and other collections)."""
        return count(self.jobs(*arguments, configs=configs))

    def jobs(self, *arguments: str, configs=("config/ci.yaml",)) -> list["Job"]:
        """Return the jobs of a dry run, each after those whose outputs it reads."""
        output = self.run("--dry-run", *arguments, configs=configs)
        lines = (self.folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines or "Nothing to be done" in output, output
        return [Job(**json.loads(line)) for line in lines]


class Job(NamedTuple):
    """One job, as Snakemake has it."""

    rule_name: str
    input: list[str]
    output: list[str]
    gpu: int | None


def count(jobs: Iterable[Job]) -> dict[str, int]:
    """Return rule -> number of jobs, without those that only name what others make."""
    collections = ("all", "tables", "metrics", "runs", "figures", "notebooks")
    return dict(Counter(job.rule_name for job in jobs if job.rule_name not in collections))


def copied(source: Path, target: Path) -> Checkout:
    """Copy a checkout with its results; time stamps are kept."""
    checkout = Checkout.__new__(Checkout)
    checkout.folder = Path(shutil.copytree(source, target, dirs_exist_ok=True))
    return checkout


def wait_for(job, condition):
    """Wait for something that a process does before it ends."""
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Let one of the processes of pytest-xdist make a folder that all of them read.

    It lies in the folder KMEBENCH_TESTS_SHARED, where the gate looks for it later.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    shared = Path(os.environ.get("KMEBENCH_TESTS_SHARED", base)) / name
    complete = shared.with_name(f"{name}.complete")
    with FileLock(f"{shared}.lock"):
        if not complete.is_file():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            make(shared)
            complete.touch()
    return shared


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Checkout:
    """A checkout in which config/ci.yaml has run to the end; each process has a copy of its own."""
    shared = made_once(tmp_path_factory, "shared", lambda folder: Checkout(folder).run())
    return copied(shared, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """A fresh copy of the finished checkout."""
    return copied(finished.folder, tmp_path / "copy")
