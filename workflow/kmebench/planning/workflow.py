"""Snakemake as a command: make one file of the workflow, and tell why it failed."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kmebench.errors import ConfigError, ModelError
from kmebench.io.logs import doing

SNAKEFILE = Path("Snakefile")
#: What a script says of its work (kmebench.io.logs.announce): its rule, its wildcards, a text.
_ANNOUNCED = re.compile(r"[a-z_]+ [^:]+: \S")


def check_workflow() -> None:
    """Refuse a folder that the workflow cannot run in: an installed package is without it.

    Raises:
        ConfigError: there is no Snakefile.
    """
    if not SNAKEFILE.is_file():
        raise ConfigError("There is no Snakefile here; run this in the folder of KME-Bench.")


def make(path: Path, configfiles: Sequence[Path]) -> None:
    """Let the workflow make what is not there yet, by config.yaml with ``configfiles`` over it.

    Raises:
        ConfigError: the workflow is not here.
        ModelError: it cannot; says why.
    """
    if path.exists():
        return
    check_workflow()
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    command += ["--quiet", "progress", "rules", "host", "reason"]
    command += ["--configfile", *map(str, configfiles)] if configfiles else []
    command += ["--", str(path)]
    with doing(f"making {path} (once)"):
        status, log = _run(command)
    if status:
        raise ModelError(f"{path} could not be made: {reason(log)}")


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its status and what it wrote. What scripts announce is shown."""
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            lines.append(line)
            if _ANNOUNCED.match(line):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode, "".join(lines)


def reason(log: str) -> str:
    """Find why the workflow failed in what it wrote: a rule's sentence, or Snakemake's last error.

    All that it wrote, if there is neither.
    """
    if told := re.findall(r"^[a-z_]+: .*", log, re.MULTILINE):
        return str(told[-1])
    errors = re.split(r"^\w+(?:Error|Exception)(?: in file .*)?:?\n", log, flags=re.MULTILINE)
    lines = errors[-1].splitlines()
    return " ".join(line for line in lines if not line.startswith(" "))
