"""Seconds per edit and peak memory of PAC, the released schedule and Full-C.

python benchmarks/pac_edit.py [--architecture llama3-8b --device cuda --dtype bfloat16]
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
from dense_released import DenseReleased

from kmebench.editors.base import Editor
from kmebench.editors.full_c import FullC, FullCHparams
from kmebench.editors.pac import PAC, PACHparams
from kmebench.editors.pac_released import PACReleased, PACReleasedHparams
from kmebench.models.editable import EditableModel

FORMATS = ("{:.0%}", "{:.3f}", "{:.0f}", "{:.2f}", "{:.2f}")
HEADER = ["editor", "requests", "steps", "learnt", "s/edit", "tokens/s", "peak (GiB)"]
HEADER += ["peak / weights"]


#: Learning rates chosen for SmolLM2 (config/tuned).
RATES = {"pac": 3e-4, "pac-released": 1e-3, "full-c": 1e-4}


def editors(steps: int | None) -> dict[str, Editor]:
    """PAC as it is used (it stops when the fact is learnt), or with a fixed number of steps."""
    fixed = {} if steps is None else {"steps": steps, "tolerance": 0.0}
    released = PACReleasedHparams(learning_rate=RATES["pac-released"])
    full_c = FullCHparams(learning_rate=RATES["full-c"], norm_constraint=None, **fixed)
    return {
        "PAC": PAC(PACHparams(trace_on="current", learning_rate=RATES["pac"], **fixed), {}),
        "PAC, released schedule": PACReleased(released, {}),
        "PAC, released schedule, dense": DenseReleased(released, {}),
        "Full-C": FullC(full_c, {}),
    }


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
    options.add_argument("--editors", nargs="+", help="some of the rows (default: all)")
    options.add_argument("--steps", type=int, help="fixed steps of PAC and Full-C")
    arguments = options.parse_args()
    model = build(arguments)
    rows = []
    for name, editor in editors(arguments.steps).items():
        if arguments.editors and name not in arguments.editors:
            continue
        for size in arguments.sizes:
            rows.append([name, *measure(model, editor, size, arguments.repeats)])
            print(" ".join(rows[-1]), flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
