"""Targets of MEMIT's family: requests together, one by one, and by plain whole forward passes.

python benchmarks/targets.py [--requests 20] [--steps 10]

All take the same steps (none stops early), so the ratios are those of the arithmetic alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from common import build, openfacts_requests, parser, seconds, table
from torch import Tensor
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import MEMIT_LENGTHS, Contexts, prefixes, sample_contexts
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.models.early_exit import first
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import SubjectText

HEADER = ["way", "s/request", "times the last"]


def plain(
    model: EditableModel, request: EditRequest, contexts: Contexts, settings: TargetSettings
) -> Tensor:
    """δ of one request: every step runs all texts through the whole model and its whole head."""
    before = prefixes(contexts)
    texts = [SubjectText.of(request, b, request.target_new) for b in before]
    texts.append(SubjectText("", "{} is a", request.subject, None))
    encoded = model.encode_subjects(texts)
    rows, width = torch.arange(len(encoded)), max(len(e.ids) for e in encoded)
    ids = torch.tensor([[*e.ids, *[model.pad_id] * (width - len(e.ids))] for e in encoded])
    subjects = torch.tensor([e.subject_last for e in encoded])
    delta = torch.zeros(model.model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    start, log_p0 = None, None

    def add(_module, _inputs, output):
        nonlocal start
        states = first(output).clone()
        start = states[0, subjects[0]].detach() if start is None else start
        states[rows, subjects] += delta
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = model.layers[settings.layer].register_forward_hook(add)
    for step in range(settings.steps):
        log_p = model.model(ids).logits.log_softmax(dim=-1)
        answers = [slice(len(e.ids) - e.n_target - 1, len(e.ids) - 1) for e in encoded[:-1]]
        nll = sum(
            cross_entropy(p[answer], torch.tensor(e.target_ids))
            for p, answer, e in zip(log_p[:-1], answers, encoded[:-1], strict=True)
        )
        said = log_p[-1, encoded[-1].subject_last]
        log_p0 = said.detach() if log_p0 is None else log_p0
        kl = (said.exp() * (said - log_p0)).sum()
        loss = nll / len(before) + settings.kl_factor * kl
        loss = loss + settings.weight_decay * delta.norm() / start.norm() ** 2
        if step == settings.steps - 1:  # the last pass moves nothing
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (settings.clamp_factor * start.norm() / delta.norm()).clamp(max=1.0)
    handle.remove()
    return start + delta.detach()


def rows(
    model: EditableModel, requests: Sequence[EditRequest], settings: TargetSettings, repeats: int
) -> list[list[str]]:
    contexts = sample_contexts(model, MEMIT_LENGTHS, seed=0)
    found: dict[str, Tensor] = {}

    def replayed(name: str, micro_batch: int) -> None:
        changed = replace(settings, micro_batch=micro_batch)
        found[name] = optimise_targets(model, requests, contexts, changed, "memit").values

    def whole() -> None:
        found["plain"] = torch.stack([plain(model, r, contexts, settings) for r in requests])

    ways = {
        "whole forward passes, one by one": whole,
        "replayed, one by one": lambda: replayed("alone", 1),
        "replayed, together": lambda: replayed("together", len(requests)),
    }
    spent = {name: seconds(way, repeats, warm_up=0) / len(requests) for name, way in ways.items()}
    for name in ("plain", "alone"):
        gap = (found[name] - found["together"]).norm() / found["together"].norm()
        print(f"{name} against together: relative difference of the targets {gap:.1e}")
    last = list(spent.values())[-1]
    return [[name, f"{s:.3f}", f"{s / last:.2f}"] for name, s in spent.items()]


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=20)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--layer", type=int, default=8)
    options.set_defaults(repeats=1)
    arguments = options.parse_args()
    settings = TargetSettings(
        layer=arguments.layer,
        site="layer",
        steps=arguments.steps,
        learning_rate=0.1,
        kl_factor=0.0625,
        weight_decay=1e-3,
        clamp_factor=4.0,
        stop_loss=0.0,
    )
    model = build(arguments)
    requests = openfacts_requests(arguments.requests)
    print(table(HEADER, rows(model, requests, settings, arguments.repeats)))


if __name__ == "__main__":
    main()
