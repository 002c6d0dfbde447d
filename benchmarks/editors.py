"""Seconds per edit and peak memory of every editor, with the model's configured hyper-parameters.

python benchmarks/editors.py [--architecture llama3-8b --device cuda --dtype bfloat16]

The covariance is read from the results of the workflow; a model of random weights has a made-up C.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    build,
    made_up_metric,
    made_up_network,
    made_up_texts,
    made_up_trained,
    openfacts_requests,
    parser,
    peak_memory,
    reset_peak,
    said,
    seconds,
    table,
    weight_bytes,
)

from kmebench.editors.base import Editor, build_editor
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.needs import Hypernetwork, NeutralMetric, Pipeline, Trained
from kmebench.models.editable import EditableModel
from kmebench.planning.config import read_config
from kmebench.planning.grid import base_hparams, card_of_method

HEADER = ["method", "requests", "steps", "learnt", "s/edit", "peak (GiB)", "peak / weights"]
FORMATS = ("{:.0f}", "{:.0f}", "{:.0%}", "{:.2f}", "{:.2f}", "{:.2f}")


def hparams_of(config: Mapping[str, Any], model: str, method: str, size: int) -> dict[str, Any]:
    """What is configured; no stage is cached here, so tracing counts as time of the edit."""
    mode = "batch" if size > 1 else "consecutive"
    return base_hparams(config, model, method, mode) | dict(card_of_method(config, method).single)


def covariance_layers(config: Mapping[str, Any], model: str, methods: Sequence[str]) -> list[int]:
    """The layers whose covariance the methods read."""
    layers: set[int] = set()
    for method in methods:
        card = card_of_method(config, method)
        hparams = card.values(hparams_of(config, model, method, 1))
        for need in card.needs(hparams, Pipeline("consecutive", 1)):
            layers.update(need.covariance_layers)
    return sorted(layers)


def made_up_covariance(path: Path, model: EditableModel, layers: Sequence[int]) -> None:
    """Write a diagonal C, half of it unused, for every layer that an editor asks for."""
    diagonal = torch.tensor([1.0, 1e-3]).repeat(model.ffn_width // 2)
    write_covariance(path, {layer: diagonal.diag() for layer in layers}, 0, {"source": "made up"})


def measure(model: EditableModel, editor: Editor, size: int, repeats: int) -> list[str]:
    """Everything of one row but the method's name.

    A first edit, which is applied, makes what is made once in a run: contexts, factors of C.
    """
    first, *requests = openfacts_requests(1 + size * repeats)
    model.apply(editor.edit(model, [first]))
    batches = [requests[i * size : (i + 1) * size] for i in range(repeats)]
    waiting = iter(batches)
    editor.steps = 0
    before = reset_peak(model)

    def edit() -> None:
        model.apply(editor.edit(model, next(waiting)))

    spent = seconds(edit, repeats, warm_up=0)
    # On a CPU, beyond the process as it was, with the weights.
    peak = peak_memory(model) - before + weight_bytes(model)
    share = said(model, batches[-1])
    model.revert()
    editor.load_state_dict({})
    numbers = (
        size,
        editor.steps / repeats,
        share,
        spent / size,
        peak / 2**30,
        peak / weight_bytes(model),
    )
    return [f.format(x) for f, x in zip(FORMATS, numbers, strict=True)]


def rows(arguments: argparse.Namespace, scratch: Path) -> list[list[str]]:
    model, config = build(arguments), read_config(arguments.config)
    name = arguments.architecture or arguments.model.name
    methods = arguments.methods or list(config["methods"])
    covariance = Path(f"results/covariance/{name}.safetensors")
    if arguments.architecture:
        covariance = scratch / "covariance.safetensors"
        made_up_covariance(covariance, model, covariance_layers(config, name, methods))
        made_up_metric(scratch / "metric.safetensors", model)
    texts = made_up_texts(scratch)
    found = []
    for method, size in itertools.product(methods, arguments.sizes):
        hparams, card = hparams_of(config, name, method, size), card_of_method(config, method)
        assets = {"covariance": covariance, **texts}
        for need in card.needs_of(card.values(hparams), Pipeline("consecutive", 1)):
            if isinstance(need, NeutralMetric):
                made_up = scratch / "metric.safetensors"
                made = Path("results", need.path(name, ""))
                assets[need.key] = made_up if arguments.architecture else made
            if isinstance(need, Trained):
                learnt = scratch / f"{method}.safetensors"
                assets[need.key] = made_up_trained(learnt, need, texts["encoder"])
            if isinstance(need, Hypernetwork):
                assets[need.key] = scratch / f"{method}.network"
                made_up_network(assets[need.key], model, need)
        editor = build_editor(card.name, hparams, assets)
        found.append([method, *measure(model, editor, size, arguments.repeats)])
        print(" ".join(found[-1]), flush=True)
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 20])
    options.add_argument("--config", type=Path, default=Path("config.yaml"))
    options.add_argument("--methods", nargs="+", help="some of the rows (default: all)")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(HEADER, rows(arguments, Path(folder))))


if __name__ == "__main__":
    main()
