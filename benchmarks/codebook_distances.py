"""How far paraphrases and unrelated prompts lie from an edit prompt, by layer: what GRACE's radius
has to tell apart.

python benchmarks/codebook_distances.py --model results/models/smollm2-135m \
    --requests results/data/counterfact.development.jsonl

Distances are of a projection's inputs at the prompts' last tokens. Printed are medians over
requests (of each one's mean), and the share of paraphrases that lie nearer than the nearest tenth
of all unrelated prompts. Look at development records alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import table
from torch import Tensor

from kmebench.data.records import EditRequest, read_requests
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded
from kmebench.models.hooks import hooked
from kmebench.precision import at_least_float32

HEADER = ["layer", "paraphrase", "unrelated", "other edit", "told apart"]


@torch.no_grad()
def last_inputs(model: EditableModel, prompts: Sequence[str], projection: str) -> Tensor:
    """Return the inputs of one projection of all layers at the prompts' last tokens, [L, P, in]."""
    rows = []
    for ids in model.encode_prompts(prompts):
        seen: list[Tensor] = []
        handles = (
            getattr(ffn, projection).module.register_forward_pre_hook(
                lambda _module, inputs, seen=seen: seen.append(at_least_float32(inputs[0][0, -1]))
            )
            for ffn in model.ffn
        )
        batch = model.collate([Encoded(ids, n_target=0)])
        with hooked(handles):
            model.model.base_model(input_ids=batch.input_ids, use_cache=False)
        rows.append(torch.stack(seen))
    return torch.stack(rows, dim=1)


def distances(
    model: EditableModel, requests: Sequence[EditRequest], projection: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distances of each request's paraphrases, unrelated prompts and the nearest other
    request, [L, R] each (means over prompts).
    """
    edits = last_inputs(model, [r.filled_prompt for r in requests], projection)
    near, far = [], []
    for place, request in enumerate(requests):
        for prompts, into in ((request.paraphrases, near), ([p for p, _ in request.locality], far)):
            asked = last_inputs(model, list(prompts), projection)
            into.append((asked - edits[:, place : place + 1]).norm(dim=2).mean(dim=1))
    between = torch.cdist(edits, edits)
    between.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return torch.stack(near, dim=1), torch.stack(far, dim=1), between.amin(dim=2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", type=Path, default=Path("results/models/smollm2-135m"))
    options.add_argument("--requests", type=Path, nargs="+", required=True)
    options.add_argument("--projection", choices=["key", "value"], default="value")
    arguments = options.parse_args()
    model = EditableModel.load(arguments.model)
    for path in arguments.requests:
        requests = [r for r in read_requests(path) if r.paraphrases and r.locality]
        near, far, other = distances(model, requests, arguments.projection)
        print(f"\n{path}: {len(requests)} requests, input of the {arguments.projection} projection")
        rows = [
            [
                str(layer),
                *(f"{float(x[layer].median()):.2f}" for x in (near, far, other)),
                f"{float((near[layer] < far[layer].quantile(0.1)).float().mean()):.0%}",
            ]
            for layer in range(model.n_layers)
        ]
        print(table(HEADER, rows))


if __name__ == "__main__":
    main()
