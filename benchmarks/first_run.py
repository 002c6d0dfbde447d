"""Where the time of a run goes: jobs and seconds of every rule, from Snakemake's own records.

python benchmarks/first_run.py [FOLDER]

FOLDER is where Snakemake has run (this one). Seconds are those between a job's start and its end;
jobs run side by side. The last line is from the first start to the last end.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from common import table

HEADER = ["rule", "jobs", "seconds", "a job", "share"]


def jobs(folder: Path) -> list[tuple[str, float, float]]:
    """Return rule, start and end of every job, in seconds since 1970.

    There is a record for every output; those of one job have one log.
    """
    found: dict[tuple[str, ...], tuple[str, float, float]] = {}
    for path in (folder / ".snakemake/metadata").rglob("*"):
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if record.get("endtime"):
            rule, times = record["rule"], (record["starttime"], record["endtime"])
            found[rule, *record["log"]] = (rule, *times)
    return list(found.values())


def rows(done: list[tuple[str, float, float]]) -> list[list[str]]:
    """Return a row for every rule, the longest first, and one for all."""
    spent = defaultdict(list)
    for rule, start, end in done:
        spent[rule].append(end - start)
    total = sum(map(sum, spent.values()))
    found = [
        [rule, str(len(s)), f"{sum(s):.0f}", f"{sum(s) / len(s):.1f}", f"{sum(s) / total:.0%}"]
        for rule, s in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    wall = max(end for *_, end in done) - min(start for _, start, _ in done)
    return [*found, ["by the clock", str(len(done)), f"{wall:.0f}", "", ""]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    print(table(HEADER, rows(jobs(parser.parse_args().folder))))


if __name__ == "__main__":
    main()
