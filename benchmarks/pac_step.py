"""One PAC step against a plain forward and input-gradient backward pass of the same batch.

python benchmarks/pac_step.py [--architecture llama3-8b --device cuda --dtype bfloat16]
"""

import torch
from common import bandwidth, build, openfacts_requests, parser, seconds, table, weight_bytes
from torch.nn.functional import cross_entropy

from kmebench.editors.pac import PAC, PACHparams, trace_routes
from kmebench.tracing.observe import observed


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--paths", type=int, default=15)
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 20])
    options.add_argument("--steps", type=int, default=10)
    arguments = options.parse_args()
    model = build(arguments)
    limit = 2 * weight_bytes(model) / bandwidth(model.device)
    rows = []
    for size in arguments.sizes:
        requests = openfacts_requests(size)
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        batch = model.collate(encoded).repeat(2)

        def plain(batch=batch):
            with observed(model, lambda *_: None, ()):
                cross_entropy(model.answer_logits(batch), batch.labels).backward()

        hparams = PACHparams(
            paths=arguments.paths, trace_on="current", tolerance=0.0, steps=arguments.steps
        )
        routes = trace_routes(model, requests, hparams)
        editor = PAC(hparams, {})

        def optimise(editor=editor, requests=requests, encoded=encoded, routes=routes):
            editor._optimise(model, requests, encoded, routes)

        base = seconds(plain, arguments.repeats)
        step = seconds(optimise, arguments.repeats) / arguments.steps
        tokens = batch.input_ids.numel()
        rows.append(
            [str(size), str(tokens)]
            + [f"{base * 1e3:.1f}", f"{step * 1e3:.1f}", f"{step / base:.2f}"]
            + [f"{limit * 1e3:.1f}", f"{limit / step:.0%}"]
        )
    header = ["requests", "tokens", "plain (ms)", "PAC step (ms)", "ratio"]
    print(table([*header, "limit (ms)", "share of limit"], rows))
    print("limit: the weights read twice, forward and backward, at the memory's bandwidth")


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
