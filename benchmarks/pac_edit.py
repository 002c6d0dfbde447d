"""Seconds per edit and peak memory of PAC, the released schedule and Full-C.

python benchmarks/pac_edit.py [--architecture llama3-8b --device cuda --dtype bfloat16]
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import (
    build,
    openfacts_requests,
    parser,
    peak_memory,
    reset_peak,
    said,
    seconds,
    table,
    weight_bytes,
)
from editors import hparams_of

from kmebench.editors.base import Editor, build_editor
from kmebench.models.editable import EditableModel
from kmebench.planning.config import read_config

FORMATS = ("{:.0%}", "{:.3f}", "{:.0f}", "{:.2f}", "{:.2f}")
HEADER = ["editor", "requests", "steps", "learnt", "s/edit", "tokens/s", "peak (GiB)"]
HEADER += ["peak / weights"]


#: Row -> (editor, method whose configured hyper-parameters it has, others that it has instead).
ROWS = {
    "PAC": ("pac", "pac", {}),
    "PAC, learning rate 1e-3": ("pac", "pac", {"learning_rate": 1e-3}),
    "PAC, learning rate 2e-3": ("pac", "pac", {"learning_rate": 2e-3}),
    "PAC, released schedule": ("pac-released", "pac-released", {}),
    "PAC, released schedule, dense": ("dense_released:CARD", "pac-released", {}),
    "Full-C": ("full-c", "full-c", {}),
}


def build_row(row: str, model: str, size: int, steps: int | None) -> Editor:
    """An editor that stops when the facts are learnt, or after a fixed number of steps."""
    editor, method, other = ROWS[row]
    hparams = hparams_of(read_config(Path("config.yaml")), model, method, size) | other
    if steps is not None and method in ("pac", "full-c"):
        hparams |= {"steps": steps, "tolerance": 0.0}
    return build_editor(editor, hparams, {})


@contextmanager
def counted_tokens(model: EditableModel) -> Iterator[list[int]]:
    """Yield the sizes of all batches fed to the model in the block, in tokens with padding."""
    sizes: list[int] = []

    def count(_module, _inputs, keywords) -> None:
        sizes.append(keywords["input_ids"].numel())

    handle = model.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    handle.remove()


def measure(model: EditableModel, editor: Editor, size: int, repeats: int) -> tuple[str, ...]:
    """Everything of one row but the editor's name."""
    requests = openfacts_requests(size)
    editor.steps = 0
    model.apply(editor.edit(model, requests))
    share, steps = said(model, requests), editor.steps
    model.revert()
    before = reset_peak(model)
    with counted_tokens(model) as sizes:
        spent = seconds(lambda: editor.edit(model, requests), repeats, warm_up=0)
    # On a CPU, beyond the process as it was, with the weights.
    peak = peak_memory(model) - before + weight_bytes(model)
    speed = sum(sizes) / repeats / spent
    numbers = (share, spent / size, speed, peak / 2**30, peak / weight_bytes(model))
    texts = (f.format(x) for f, x in zip(FORMATS, numbers, strict=True))
    return (str(size), str(steps), *texts)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 20])
    options.add_argument("--editors", nargs="+", choices=ROWS, help="some of the rows")
    options.add_argument("--steps", type=int, help="fixed steps of PAC and Full-C")
    arguments = options.parse_args()
    model = build(arguments)
    name = arguments.architecture or arguments.model.name
    rows = []
    for row, size in itertools.product(arguments.editors or ROWS, arguments.sizes):
        editor = build_row(row, name, size, arguments.steps)
        rows.append([row, *measure(model, editor, size, arguments.repeats)])
        print(" ".join(rows[-1]), flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
