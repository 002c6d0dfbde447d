"""The parts of ``gpu.py``: what is measured, and how."""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from common import (
    ARCHITECTURES,
    bandwidth,
    openfacts_requests,
    peak_memory,
    product_speed,
    random_model,
    reset_peak,
    seconds,
    weight_bytes,
)
from kernels import profiled_update, update_seconds
from pac_step import plain
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Stopwatch, build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.locate.covariance.keys import Written
from kmebench.editors.locate.covariance.stage import Sums
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.needs import Covariance, Need, NeutralMetric, Pipeline
from kmebench.editors.pac.cards import PACHparams
from kmebench.editors.pac.neutral import write_metric
from kmebench.editors.pac.pac import PAC
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Batch

Piece = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How large everything is."""

    batch: int = 20  # requests edited together
    large: int = 100  # requests of the yardstick's largest batch
    steps: int = 10  # of a PAC edit that is timed
    consecutive_steps: int = 5
    edits: int = 300  # consecutive
    stretch: int = 50
    editor_steps: int = 25  # of the other editors
    moment_tokens: int = 4096  # of 14,336 (Llama-3), 11,008 or 16,384 that full rank takes
    read_bytes: int = 1 << 30
    product: int = 8192
    repeats: int = 3


SHAPES = {
    "full": Shape(),
    "tiny": Shape(3, 6, 3, 2, 6, 2, 3, 32, 1 << 20, 64, 1),
}
TINY = {
    "llama": {
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 64,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4000,
    },
    "gptj": {
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 9,
        "n_head": 4,
        "rotary_dim": 4,
        "vocab_size": 4000,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
#: Layers whose second moments are made: MEMIT's, among them ROME's.
LAYERS = (4, 5, 6, 7, 8)
RIDGE = 1e-3  # added to C, which has not its full rank
_FIXED = {"tolerance": 0.0}
_TARGETS = {"learning_rate": 1e-4}
#: Editor -> hyper-parameters that are not its defaults. AlphaEdit decomposes C, and natural PAC
#: inverts it, which takes long: both edit one layer. The tiny shape ends with the last of these.
EDITORS: dict[str, dict[str, Any]] = {
    "full-c": {"layers": (5,)} | _FIXED,
    "rome": {"layer": 5} | _TARGETS,
    "memit": {"layers": LAYERS} | _TARGETS,
    "lora": _FIXED,
    "alphaedit": {"layers": LAYERS[-1:]} | _TARGETS,
    "npac": {"layers": LAYERS[-2:-1], "neutral_tokens": 2048} | _FIXED,
}
#: Editors that make one edit of many requests; the others take them one by one.
TOGETHER = ("memit", "lora", "alphaedit", "npac")


class Bench:
    """What the parts share: one model at a time, the machine's limits, a clock."""

    def __init__(self, shape: str, device: torch.device, budget: float, scratch: Path) -> None:
        self.shape, self.tiny = SHAPES[shape], shape == "tiny"
        self.device, self.scratch = device, scratch
        self._deadline = time.monotonic() + budget
        self._model: tuple[str, EditableModel] | None = None

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline - time.monotonic()

    def model(self, name: str) -> EditableModel:
        """Return a model as it was made."""
        if self._model is None or self._model[0] != name:
            self.forget()
            config = self._config(name)
            self._model = name, random_model(config, "bfloat16", self.device)
        model = self._model[1]
        model.revert()
        return model

    def _config(self, name: str) -> PretrainedConfig:
        config = ARCHITECTURES[name]()
        if not self.tiny:
            return config
        return type(config)(**(config.to_dict() | TINY[config.model_type]))

    def forget(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def read_speed(self) -> float:
        """Bytes that the device reads from its memory in a second."""
        return bandwidth(self.device, self.shape.read_bytes)

    @cached_property
    def flop_speed(self) -> float:
        """FLOP of bfloat16 products that the device makes in a second."""
        return product_speed(self.device, self.shape.product)

    def moments(self, name: str) -> Path:
        """Return a file of second moments of few tokens, made on the first call for a model."""
        path = self.scratch / f"{name}.safetensors"
        if not path.exists():
            made = few_moments(self.model(name), LAYERS, self.shape.moment_tokens)
            write_covariance(path, made, self.shape.moment_tokens, {"source": "random tokens"})
        return path

    def assets(self, name: str, needs: Sequence[Need]) -> dict[str, str]:
        """Return the files that an editor needs; C stands for what is computed of it, too."""
        made = {}
        for need in needs:
            if isinstance(need, NeutralMetric):
                path = self.scratch / f"{name}.{need.name}.safetensors"
                write_metric(path, self.model(name), need)
                made[need.key] = str(path)
            else:
                made[Covariance.asset] = str(self.moments(name))
        return made


@torch.no_grad()
def few_moments(
    model: EditableModel, layers: Sequence[int], tokens: int
) -> dict[int, torch.Tensor]:
    """Return C + RIDGE·I of random tokens; with fewer of them than keys are wide, C is singular."""
    vocabulary = model.model.config.vocab_size
    length = min(512, tokens)
    ids = torch.randint(vocabulary, (tokens // length, length), device=model.device)
    sums = Sums(model, layers)
    Written(ids, torch.ones_like(ids, dtype=torch.bool)).feed(model, layers, sums.add)
    sums.settle()
    for total in sums.total.values():
        total /= ids.numel()
        total.diagonal().add_(RIDGE)
    return {layer: total.float() for layer, total in sums.total.items()}


def limit_seconds(
    bench: Bench, model: EditableModel, batch: Batch, *, reads: int, passes: int
) -> float:
    """Return the least time of work that reads all weights ``reads`` times.

    Each of ``passes`` (a forward one, or one backward) multiplies every token with every weight,
    and what is said at the answers with the head.
    """
    head = model.model.get_output_embeddings().weight.numel()
    looked_up = model.model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.model.parameters()) - head - looked_up
    flop = 2 * passes * (body * tokens_of(batch) + head * len(batch.labels))
    return max(reads * weight_bytes(model) / bench.read_speed, flop / bench.flop_speed)


def tokens_of(batch: Batch) -> int:
    """Count the tokens that are fed, without padding."""
    last = batch.counts.cpu().cumsum(0) - 1  # of each row's answer positions
    return int((batch.positions.cpu()[last] + 1).sum())


def collated(model: EditableModel, requests: Sequence[EditRequest]) -> Batch:
    return model.collate(model.encode([(r.filled_prompt, r.target_new) for r in requests]))


# -- parts ----------------------------------------------------------------------------


def machine(bench: Bench) -> Iterator[Piece]:
    """Measure the limits."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    yield {"device": str(bench.device), "python": sys.version.split()[0]} | versions
    if bench.device.type == "cuda":
        facts = torch.cuda.get_device_properties(bench.device)
        yield {"gpu": facts.name, "memory_bytes": facts.total_memory, "cuda": torch.version.cuda}
    yield {"read_bytes_per_second": bench.read_speed}
    yield {"bfloat16_flop_per_second": bench.flop_speed}
    yield {"shape": asdict(bench.shape)}


def new_pac(steps: int) -> PAC:
    return PAC(PACHparams(trace_on="current", tolerance=0.0, steps=steps), {})


@contextmanager
def not_deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


#: Ways to take a step; the first is how it is taken. The two that double the rows, or do not, and
#: the one that does not cut a batch tell where this device should do so.
WAYS: dict[str, Callable[[], AbstractContextManager]] = {
    "as_it_is": nullcontext,
    "rows_doubled": partial(patch, "kmebench.editors.pac.pac.DOUBLED_TOKENS", 1 << 40),
    "backward_twice": partial(patch, "kmebench.editors.pac.pac.DOUBLED_TOKENS", 0),
    "batch_uncut": partial(patch, "kmebench.models.encoding.PASS_TOKENS", 1 << 40),
    "not_deterministic": not_deterministic,
}


def sizes(bench: Bench) -> dict[str, int]:
    """Requests in an edit, by what such an edit is called here."""
    return {"single": 1, "batch": bench.shape.batch}


def pac(bench: Bench, name: str, kind: str) -> Iterator[Piece]:
    """Measure a step and an edit of PAC."""
    model, editor = bench.model(name), new_pac(bench.shape.steps)
    requests = openfacts_requests(sizes(bench)[kind])
    batch = collated(model, requests)
    yield {
        "requests": len(requests),
        "tokens": tokens_of(batch),
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "read_weights_bytes": weight_bytes(model),
    }
    editor.edit(model, requests)  # warms up
    spent = {}
    for way, setting in WAYS.items():
        with setting():
            spent[way] = update_seconds(lambda: editor.edit(model, requests))
    limit = limit_seconds(bench, model, batch, reads=2, passes=3)
    yield {
        "step_seconds": spent,
        "step_limit_seconds": limit,
        "step_share_of_limit": limit / spent["as_it_is"],
    }
    edits = [edited(model, editor, requests) for _ in range(bench.shape.repeats)]
    figures = median_edit(edits)
    limit = limit_seconds(bench, model, batch, reads=2, passes=2) + figures["steps"] * limit
    yield {"edit": figures, "edit_share_of_limit": limit / figures["seconds"]}


def median_edit(edits: Sequence[Piece]) -> Piece:
    return sorted(edits, key=lambda edit: edit["seconds"])[len(edits) // 2]


def edited(model: EditableModel, editor: Editor, requests: Sequence[EditRequest]) -> Piece:
    """Edit and apply, and put the weights back; return the figures."""
    editor.stopwatch, editor.steps = Stopwatch(), 0
    before = reset_peak(model)
    start = time.perf_counter()
    delta = editor.edit(model, requests)
    with editor.stopwatch("apply"):
        model.apply(delta)
    spent = time.perf_counter() - start
    peak = peak_memory(model) - before
    model.revert()
    return {
        "seconds": spent,
        "seconds_per_edit": spent / len(requests),
        "steps": editor.steps,
        "seconds_of": editor.stopwatch.seconds,
        "peak_over_weights_bytes": peak,
    }


def step_profile(bench: Bench, name: str) -> Iterator[Piece]:
    """Profile a step of PAC."""
    for kind, size in sizes(bench).items():
        model, editor = bench.model(name), new_pac(bench.shape.steps)
        requests = openfacts_requests(size)
        editor.edit(model, requests)  # warms up
        run = partial(editor.edit, model, requests)
        yield {kind: profiled_update(run)}


def yardstick(bench: Bench, name: str) -> Iterator[Piece]:
    """Measure a plain forward and backward pass of the same batches, and of a large one."""
    model = bench.model(name)
    for kind, size in (sizes(bench) | {"large_batch": bench.shape.large}).items():
        batch = collated(model, openfacts_requests(size))
        spent = seconds(lambda batch=batch: plain(model, batch), bench.shape.repeats)
        limit = limit_seconds(bench, model, batch, reads=2, passes=2)
        figures = {"tokens": tokens_of(batch), "gradient_of_inputs_seconds": spent}
        figures["gradient_of_inputs_share_of_limit"] = limit / spent
        if kind in sizes(bench):
            spent = seconds(lambda b=batch: with_weights(model, b), bench.shape.repeats)
            limit = limit_seconds(bench, model, batch, reads=3, passes=3)  # one of them is written
            figures["gradient_of_all_weights_seconds"] = spent
            figures["gradient_of_all_weights_share_of_limit"] = limit / spent
        yield {kind: figures}


def with_weights(model: EditableModel, batch: Batch) -> None:
    """Forward, and the gradients of all weights."""
    parameters = list(model.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        cross_entropy(model.answer_logits(batch), batch.labels).backward()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def other_editor(bench: Bench, name: str, editor: str) -> Iterator[Piece]:
    """Measure another editor: its first edit, which makes what is made once, and later ones."""
    own = EDITORS[editor] | {"steps": bench.shape.editor_steps}
    card = card_of(editor)
    asks = bench.assets(name, card.needs(card.values(own), Pipeline("consecutive", 1)))
    instance, model = build_editor(editor, own, asks), bench.model(name)
    repeats = bench.shape.repeats
    first, *facts = openfacts_requests(1 + repeats * bench.shape.batch)
    yield {"hparams": own, "first_edit": edited(model, instance, [first])}
    # What an edit remembers goes with the edit; the contexts are made once in a run.
    kept = {k: v for k, v in instance.state_dict().items() if k == "contexts"}
    for how, size in sizes(bench).items():
        edits = []
        for number in range(repeats if how == "single" or editor in TOGETHER else 0):
            instance.load_state_dict(kept)
            edits.append(edited(model, instance, facts[number * size : (number + 1) * size]))
        if edits:
            yield {how: median_edit(edits)}


def consecutive(bench: Bench, name: str) -> Iterator[Piece]:
    """Measure PAC edits one after another, by stretches; ends early when the time is over."""
    model, editor = bench.model(name), new_pac(bench.shape.consecutive_steps)
    facts = openfacts_requests(bench.shape.edits)
    editor.edit(model, facts[:1])  # warms up
    yield {"steps_of_an_edit": bench.shape.consecutive_steps}
    took = 0.0  # the stretch before
    for first in range(0, len(facts), bench.shape.stretch):
        if bench.left() < took:
            yield {"stopped_after": first}
            return
        start = time.monotonic()
        last = min(first + bench.shape.stretch, len(facts))
        yield {f"edits_{first + 1}_to_{last}": stretch(model, editor, facts[first:last])}
        took = time.monotonic() - start


def stretch(model: EditableModel, editor: Editor, facts: Sequence[EditRequest]) -> Piece:
    """Edit one fact after another; return the means of an edit and the memory at the end."""
    editor.stopwatch = Stopwatch()
    reset_peak(model)
    start = time.perf_counter()
    for fact in facts:
        delta = editor.edit(model, [fact])
        with editor.stopwatch("apply"):
            model.apply(delta)
    spent = time.perf_counter() - start
    peak = peak_memory(model)
    return {
        "seconds_per_edit": spent / len(facts),
        "seconds_of": {name: s / len(facts) for name, s in editor.stopwatch.seconds.items()},
        "peak_bytes": peak,
        "held_bytes": reset_peak(model),
    }
