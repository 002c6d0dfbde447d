"""How much main memory a job with a model asks for. Imports no torch.

Python, torch and the results, the weights, what is asked of the model, and what the editor's card
says that it holds beside them. ``benchmarks/memory.py`` compares it with what runs take.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kmebench.editors.cards import card_of
from kmebench.editors.needs import Hypernetwork, Spectrum, Trained
from kmebench.editors.sizes import (
    METRIC_LAYERS,
    METRIC_LENGTH,
    METRIC_ROWS,
    PROMPT,
    Job,
    as_much_again,
    target_graph,
)
from kmebench.planning import grid

#: Bytes of Python and its libraries, a tokenizer, requests and predictions.
_PROCESS = 0.6e9
#: Places at which the model is asked in one pass of an evaluation, for each prompt of it.
_PLACES = 2
#: Copies of [M, M] in float64 while C is inverted, and while its eigenvectors are computed.
_INVERTING, _DECOMPOSING = 4, 6
#: Bytes of the sentence encoder while it is fine-tuned, on texts of a dozen requests.
_TUNED_ENCODER = 1e9
#: Copies of what an edit holds while a network is trained: itself, its gradient, Adam's moments.
_LEARNING = 4
#: A model whose shape the config does not say is taken for one of half a billion parameters.
_SHAPE = {"layers": 24, "width": 1024, "ffn_width": 4096, "parameters": 500_000_000}
#: Requests that are traced, or whose targets are optimised, together.
STAGE = 20


def job_of(config: Mapping[str, Any], model: str, requests: int = 1) -> Job:
    """Return the sizes of a model, and that ``requests`` are worked on together."""
    spec = config["models"][model]
    stored = grid.BYTES[spec["dtype"]]
    shape = spec.get("shape", _SHAPE)
    return Job(**shape, requests=requests, edits=requests, consecutive=False, weight_bytes=stored)


def asked_by_run(config: Mapping[str, Any], run: grid.Run) -> float:
    """Return the bytes that a run of the grid takes at most."""
    size = grid.datasets(config)[run.dataset]
    most = {"consecutive": run.turn, "batch": config["batch_size"]}.get(run.pipeline, size)
    card, values = grid.card_of_method(config, run.method), grid.values_of(config, run)
    job = job_of(config, run.model, min(size, most))
    job = replace(job, edits=size, consecutive=run.pipeline != "batch")
    return asked_by_model(config, run.model) + card.holds(values, job)


def asked_by_model(config: Mapping[str, Any], model: str) -> float:
    """Return the bytes of a process that asks a model."""
    job = job_of(config, model)
    weights = job.parameters * job.weight_bytes
    return _PROCESS + weights + _PLACES * config["evaluation"]["batch_size"] * job.logits / 2


def asked_by_trace(config: Mapping[str, Any], model: str) -> float:
    """Return the bytes of a process that traces requests one by one."""
    job = job_of(config, model)
    return asked_by_model(config, model) + job.graph(1)


def asked_by_covariance(config: Mapping[str, Any], model: str, layers: int) -> float:
    """Return the bytes of the pass that sums k kᵀ of some layers, of what it adds and writes."""
    job = job_of(config, model)
    return asked_by_model(config, model) + (1.5 * layers + 1) * job.factor


def asked_by_factor(config: Mapping[str, Any], model: str, kind: str) -> float:
    """Return the bytes of a process, without the model, that computes a factor of C."""
    copies = _DECOMPOSING if kind == Spectrum.asset else _INVERTING
    return _PROCESS + copies * job_of(config, model).factor


def asked_by_metric(config: Mapping[str, Any], model: str) -> float:
    """Return the bytes of a process that measures the neutral metric, a few layers at a time."""
    job = job_of(config, model)
    moments = METRIC_LAYERS * 4 * 8 * job.width**2  # two sums, and what is added to them
    graph = METRIC_ROWS * (job.graph(1, tokens=METRIC_LENGTH) + METRIC_LENGTH * job.logits)
    return asked_by_model(config, model) + moments + graph


def asked_by_targets(config: Mapping[str, Any], model: str, layer: int) -> float:
    """Return the bytes of a process that optimises targets of many requests at a layer."""
    job = job_of(config, model, STAGE)
    return asked_by_model(config, model) + target_graph(job, STAGE, layer)


def asked_by_training(config: Mapping[str, Any], model: str, need: Trained) -> float:
    """Return the bytes of a process that trains what an editor learns: the weights once more.

    A stage that reads the sentence encoder may fine-tune it.
    """
    job = job_of(config, model)
    encoder = _TUNED_ENCODER if need.reads_encoder else 0.0
    return asked_by_model(config, model) + as_much_again(None, job) + encoder


def asked_by_network(config: Mapping[str, Any], model: str, need: Hypernetwork) -> float:
    """Return the bytes of a process that trains a hyper-network, with logits at all places."""
    card, job = card_of(need.editor), job_of(config, model, need.records)
    values = card.values(need.settings)
    logits = min(need.records, values.micro_batch) * PROMPT * job.logits
    return asked_by_model(config, model) + _LEARNING * card.holds(values, job) + 2 * logits
