"""The figures of one GPU of 80 GB, in one command of at most nine minutes.

PYTHONPATH=workflow python benchmarks/gpu.py FOLDER [--budget 450]

Besides torch, transformers and pandas it needs pydantic, rich and, for LoRA alone, peft and
accelerate, all in small wheels; no model, data or network. Llama-3 8B, Llama-2 7B and GPT-J 6B
have random weights in bfloat16, a vocabulary of full size and requests of OpenFacts. As random
weights learn a fact at once or never, all steps are fixed: tolerance 0, or a learning rate too
small to learn (ROME's family). Second moments are of few tokens, with a small number added to
their eigenvalues so that they can be inverted all the same.

Parts run in the order of their worth. Each is printed when it ends; its file in FOLDER is written
anew with every figure, so a killed run keeps what is done. A part is left out, and says so, when
less is left of the budget (in seconds, after the imports) than it takes on an H100, about.

``--shape tiny --device cpu`` tries everything on a small model; its figures mean nothing.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_parts
from gpu_parts import SHAPES, Bench, Piece

from kmebench.io.files import write_json
from kmebench.models.editable import pick_device, seed_everything


class Part(NamedTuple):
    """A part: the file it is written to, its name there, about how long it takes on an H100."""

    file: str
    name: str
    seconds: float
    run: Callable[[Bench], Iterator[Piece]]


def _pac_parts(name: str) -> list[Part]:
    file = f"{name}-pac"
    return [
        Part(file, "single", 20, partial(gpu_parts.pac, name=name, kind="single")),
        Part(file, "batch", 25, partial(gpu_parts.pac, name=name, kind="batch")),
        Part(file, "profile", 15, partial(gpu_parts.step_profile, name=name)),
        Part(file, "yardstick", 10, partial(gpu_parts.yardstick, name=name)),
    ]


def _editor_part(name: str, editor: str, needs: float) -> Part:
    run = partial(gpu_parts.other_editor, name=name, editor=editor)
    return Part(f"{name}-editors", editor, needs, run)


PARTS = [
    Part("machine", "machine", 10, gpu_parts.machine),
    *_pac_parts("llama3-8b"),
    _editor_part("llama3-8b", "full-c", 15),
    _editor_part("llama3-8b", "rome", 30),
    _editor_part("llama3-8b", "memit", 40),
    _editor_part("llama3-8b", "lora", 20),
    *_pac_parts("llama2-7b"),
    _editor_part("llama3-8b", "npac", 60),
    _editor_part("llama3-8b", "alphaedit", 75),
    *_pac_parts("gptj-6b"),
    Part("llama3-8b-consecutive", "pac", 40, partial(gpu_parts.consecutive, name="llama3-8b")),
]


# -- running them ---------------------------------------------------------------------


def run_parts(bench: Bench, parts: Sequence[Part], folder: Path) -> bool:
    """Run the parts that there is time for; true if none of them failed."""
    files: dict[str, dict[str, Piece]] = {}
    good = True
    for part in parts:
        record = files.setdefault(part.file, {}).setdefault(part.name, {})
        start, left = time.monotonic(), bench.left()
        if left < part.seconds:
            record["skipped"] = f"it takes about {part.seconds:.0f} s, and {left:.0f} s are left"
        else:
            try:
                for piece in part.run(bench):
                    record |= piece
                    write_json(folder / f"{part.file}.json", files[part.file])
            except Exception as error:  # what else there is to measure is still worth its time
                traceback.print_exc()
                record["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
                bench.forget()
                good = False
            record["part_seconds"] = time.monotonic() - start
        write_json(folder / f"{part.file}.json", files[part.file])
        print(f"{part.file} {part.name}: {_short(record)}", flush=True)
    return good


def _short(value: Any) -> str:
    """Spell a record on one line, without lists."""
    if isinstance(value, dict):
        inside = (f"{k} {_short(v)}" for k, v in value.items() if not isinstance(v, list))
        return "{" + ", ".join(inside) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="where the JSON files are written")
    options.add_argument("--budget", type=float, default=450.0, help="seconds, after the imports")
    options.add_argument("--shape", choices=SHAPES, default="full")
    options.add_argument("--device", default="auto")
    arguments = options.parse_args()
    seed_everything(0)  # as the workflow's scripts do
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        device = pick_device(arguments.device)
        bench = Bench(arguments.shape, device, arguments.budget, Path(scratch))
        good = run_parts(bench, PARTS, arguments.folder)
    sys.exit(not good)


if __name__ == "__main__":
    main()
