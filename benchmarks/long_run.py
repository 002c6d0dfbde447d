"""Does an edit cost the same after 3,000 edits? One consecutive run, by stretches of edits.

python benchmarks/long_run.py [--model results/models/tiny-gptj --method pac --steps 5]

It is the session of the workflow: edits, predictions after each, predictions of all so far after
1, 3, 10, ... edits, checkpoints. The facts of OpenFacts come round, each time with another target.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import build, openfacts_requests, parser, table
from editors import hparams_of

from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_consecutive
from kmebench.planning.config import read_config
from kmebench.planning.grid import card_of_method

HEADER = ["edits", "steps/edit", "s/edit", "checkpoint (s)", "checkpoint (MiB)", "memory (GiB)"]


class Watched(Checkpoints):
    """Checkpoints that note what they took, and the memory of the process."""

    def save(self, model, editor, done, frames, outcome, stopped_by) -> None:
        start = time.perf_counter()
        super().save(model, editor, done, frames, outcome, stopped_by)
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in (self.folder / str(done)).iterdir())
        self.rows.append(self._row(outcome.times[-self.every :], done, seconds, size))
        print(" ".join(self.rows[-1]), flush=True)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows: list[list[str]] = []

    def _row(self, times: Sequence[dict], done: int, seconds: float, size: int) -> list[str]:
        spent = sum(sum(call["seconds"].values()) for call in times) / len(times)
        steps = sum(call["steps"] for call in times) / len(times)
        numbers = f"{steps:.1f}", f"{spent:.4f}", f"{seconds:.2f}", f"{size / 2**20:.1f}"
        return [f"{done - self.every + 1} to {done}", *numbers, f"{resident() / 2**30:.2f}"]


def resident() -> int:
    """Bytes of memory that the process holds now (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def requests_round(count: int) -> list[EditRequest]:
    """The facts of OpenFacts, again and again; every round has its own targets."""
    facts = openfacts_requests(min(count, 320))
    targets: dict[str, list[str]] = {}
    for fact in facts:
        targets.setdefault(fact.prompt, []).append(fact.target_new)
    found = []
    for number in range(count):
        round_, place = divmod(number, len(facts))
        fact = facts[place]
        choice = targets[fact.prompt]
        new = choice[(choice.index(fact.target_new) + round_) % len(choice)]
        found.append(replace(fact, case_id=str(number), target_new=new))
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--config", type=Path, default=Path("config.yaml"))
    options.add_argument("--method", default="pac")
    options.add_argument("--edits", type=int, default=3000)
    options.add_argument("--every", type=int, default=300)
    options.add_argument("--steps", type=int, help="of an edit at most (default: as configured)")
    options.set_defaults(model=Path("results/models/tiny-gptj"))
    arguments = options.parse_args()
    model, config = build(arguments), read_config(arguments.config)
    name = arguments.architecture or arguments.model.name
    hparams = hparams_of(config, name, arguments.method, 1)
    if arguments.steps:
        hparams["steps"] = arguments.steps
    covariance = Path(f"results/covariance/{name}.safetensors")
    card = card_of_method(config, arguments.method)
    editor = build_editor(card.name, hparams, {"covariance": covariance})
    with tempfile.TemporaryDirectory() as folder:
        watched = Watched(Path(folder), arguments.every, {})
        run_consecutive(Setup(model, editor, Settings(), watched), requests_round(arguments.edits))
    print(table(HEADER, watched.rows))


if __name__ == "__main__":
    main()
