"""One PAC step against plain forward and input-gradient backward passes of the same requests.

python benchmarks/pac_step.py [--architecture llama3-8b --device cuda --dtype bfloat16]
"""

from collections.abc import Sequence

from common import bandwidth, build, openfacts_requests, parser, seconds, table, weight_bytes
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.base import Stopwatch
from kmebench.editors.pac.cards import PACHparams
from kmebench.editors.pac.gradients import observed
from kmebench.editors.pac.pac import PAC
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch

HEADER = ["requests", "tokens", "plain, 1 loss (ms)", "plain, 2 losses (ms)", "PAC step (ms)"]
HEADER += ["to 1", "to 2", "limit (ms)", "share of limit"]


def plain(model: EditableModel, batch: Batch) -> None:
    """Forward, and the gradient of the embeddings' output: all weights frozen."""
    with observed(model, lambda *_: None, ()):
        cross_entropy(model.answer_logits(batch), batch.labels).backward()


def optimise_seconds(model: EditableModel, requests: Sequence[EditRequest], editor: PAC) -> float:
    """Seconds per step of one edit, without tracing."""
    editor.stopwatch, editor.steps = Stopwatch(), 0
    editor.edit(model, requests)
    return editor.stopwatch.seconds["optimise"] / editor.steps


def measure(
    model: EditableModel, size: int, hparams: PACHparams, repeats: int, read_seconds: float
) -> list[str]:
    """One row of the table."""
    requests = openfacts_requests(size)
    batch = model.collate(model.encode([(r.filled_prompt, r.target_new) for r in requests]))
    one = seconds(lambda: plain(model, batch), repeats)
    two = seconds(lambda: plain(model, batch.repeat(2)), repeats)
    editor = PAC(hparams, {})
    step = min(optimise_seconds(model, requests, editor) for _ in range(repeats))
    times = (f"{1e3 * x:.1f}" for x in (one, two, step))
    ratios = (f"{step / one:.2f}", f"{step / two:.2f}")
    limit = (f"{1e3 * read_seconds:.1f}", f"{read_seconds / step:.0%}")
    return [str(size), str(batch.input_ids.numel()), *times, *ratios, *limit]


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--paths", type=int, default=15)
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 20])
    options.add_argument("--steps", type=int, default=10)
    arguments = options.parse_args()
    model = build(arguments)
    # The weights read twice, forward and backward, at the memory's bandwidth.
    read_seconds = 2 * weight_bytes(model) / bandwidth(model.device)
    hparams = PACHparams(
        paths=arguments.paths, trace_on="current", tolerance=0.0, steps=arguments.steps
    )
    rows = [
        measure(model, size, hparams, arguments.repeats, read_seconds) for size in arguments.sizes
    ]
    print(table(HEADER, rows))
    print("limit: the weights read twice, forward and backward, at the memory's bandwidth")


if __name__ == "__main__":
    main()
