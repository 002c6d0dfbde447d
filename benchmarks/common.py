"""What the benchmarks share: models, requests, timing."""

import argparse
import itertools
import json
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPTJConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from kmebench.data.openfacts import fact_sentences, load_relations
from kmebench.data.records import EditRequest, write_requests
from kmebench.editors.base import build_editor
from kmebench.editors.gradient.moments import Moments as Deviations
from kmebench.editors.locate.anchor import FORMAT
from kmebench.editors.needs import Hypernetwork, Trained
from kmebench.editors.pac.neutral import Moments, save_metric
from kmebench.edits.sentences import TUNED, SentenceEncoder
from kmebench.io.tensors import write_tensors
from kmebench.models.editable import EditableModel, pick_device
from kmebench.models.tiny import END, train_tokenizer

OPENFACTS = Path("resources/openfacts")

#: The paper's models at full size; random weights need no download.
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "gptj-6b": GPTJConfig,
    "llama2-7b": lambda: LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    what = options.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, default=Path("results/models/smollm2-135m"))
    what.add_argument("--architecture", choices=ARCHITECTURES, help="random weights, full size")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--repeats", type=int, default=5)
    return options


def build(arguments: argparse.Namespace) -> EditableModel:
    """Load the model, or make one of random weights on the device."""
    torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    if arguments.architecture is None:
        torch.manual_seed(0)
        return EditableModel.load(arguments.model, dtype=arguments.dtype, device=str(device))
    return random_model(ARCHITECTURES[arguments.architecture](), arguments.dtype, device)


def random_model(config: PretrainedConfig, dtype: str, device: torch.device) -> EditableModel:
    """Make a model of random weights: on the device, and in ``dtype`` from the start."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return EditableModel(model, full_tokenizer(config.vocab_size))


def full_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on OpenFacts and fill its vocabulary up to ``size``.

    A random model says any token of its vocabulary, and what it says (contexts of ROME's family)
    must be text, of as many tokens again: the rest are made-up words of five letters.
    """
    trained = train_tokenizer([f"{p} {t}" for p, t in fact_sentences(OPENFACTS)])
    spec = json.loads(trained.backend_tokenizer.to_str())
    spec["model"]["ignore_merges"] = True  # a word of the vocabulary is one token, as in Llama 3
    vocabulary = spec["model"]["vocab"]
    for letters in itertools.product(string.ascii_lowercase, repeat=5):
        if len(vocabulary) >= size:
            break
        vocabulary.setdefault("Ġ" + "".join(letters), len(vocabulary))
    filled = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(
        tokenizer_object=filled, bos_token=END, eos_token=END, pad_token=END, unk_token=END
    )


def openfacts_requests(count: int) -> list[EditRequest]:
    """The first facts of every relation in turn, each with the object of the next one."""
    relations = load_relations(OPENFACTS)
    found = []
    for number in range(count):
        relation = relations[number % len(relations)]
        subject, true = relation.facts[number // len(relations)]
        new = next(o for _, o in relation.facts[number // len(relations) + 1 :] if o != true)
        prompt = relation.prompt
        found.append(EditRequest(str(number), subject, prompt, new, true))
    return found


def made_up_trained(path: Path, need: Trained, encoder: Path) -> Path:
    """Write what NAS reads, a length that every value gets, or SERAC, an encoder as it was."""
    if need.reads_encoder:
        base = SentenceEncoder.open(encoder)
        weights = dict(base.loaded[0].named_parameters())
        write_tensors(path, weights, TUNED, {"encoder": base.sha256})
    else:
        write_tensors(path, {"lengths": torch.ones(1)}, FORMAT, {})
    return path


def made_up_texts(folder: Path) -> dict[str, Path]:
    """Write what IKE reads: a random encoder of all-MiniLM-L6-v2's size, and records to show."""
    tokenizer = train_tokenizer([f"{p} {t}" for p, t in fact_sentences(OPENFACTS)])
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    encoder = folder / "encoder"
    torch.manual_seed(0)  # twice the same: tuned weights know the encoder by its checksum
    BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    records = [
        replace(r, paraphrases=(r.filled_prompt,), locality=((r.filled_prompt, r.target_true),))
        for r in openfacts_requests(400)[-100:]  # not those that are edited
    ]
    write_requests(folder / "development.jsonl", records)
    return {"encoder": encoder, "development": folder / "development.jsonl"}


def said(model: EditableModel, requests: Sequence[EditRequest]) -> float:
    """Share of target tokens that the model says, teacher-forced."""
    batch = model.collate(model.encode([(r.filled_prompt, r.target_new) for r in requests]))
    return float((model.answer_logits(batch).argmax(-1) == batch.labels).float().mean())


def seconds(action: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median wall time of ``action``."""
    times = []
    for number in range(warm_up + repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def weight_bytes(model: EditableModel) -> int:
    """Bytes of all weights that a forward pass reads (embeddings are looked up, not read)."""
    tied = model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    skipped = 0 if tied else model.model.get_input_embeddings().weight.nbytes
    return sum(p.nbytes for p in model.model.parameters()) - skipped


def reset_peak(model: EditableModel) -> int:
    """Forget the peak memory so far; return what is in use now, in bytes."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux
    return peak_memory(model)


def peak_memory(model: EditableModel) -> int:
    """Peak memory since :func:`reset_peak`, of the GPU or of the process, in bytes."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def bandwidth(device: torch.device, size: int | None = None, passes: int = 8) -> float:
    """Bytes per second that a reduction reads from memory.

    ``size`` in bytes, many times the cache; several passes in a row, so that a GPU does not wait.
    """
    size = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    data = torch.rand(size // 4, device=device)

    def read() -> None:
        for _ in range(passes):
            data.sum()

    return passes * data.nbytes / seconds(read, repeats=5)


def product_speed(device: torch.device, size: int, passes: int = 8) -> float:
    """FLOP per second of products of two square bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def multiply() -> None:
        for _ in range(passes):
            a @ b

    return passes * 2 * size**3 / seconds(multiply, repeats=5)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
        for r in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def made_up_metric(path: Path, model: EditableModel) -> None:
    """Write a neutral metric in which all changes of any layer cost alike."""
    layers = range(model.n_layers)
    width = model.ffn[0].value.weight.numel() // model.ffn_width  # D
    ones = {
        layer: Moments(torch.eye(width), torch.ones(model.ffn_width), torch.eye(width))
        for layer in layers
    }
    save_metric(path, ones, 0)


def made_up_network(path: Path, model: EditableModel, need: Hypernetwork) -> None:
    """Write an untrained hyper-network that takes all rows as normalised."""
    editor = build_editor(need.editor, need.settings, {})
    shapes = [site.shape for site in editor.sites(model)]
    network = editor.network(shapes, editor.hparams)
    for shape in shapes:
        zero, one = torch.zeros(sum(shape)).double(), torch.ones(sum(shape)).double()
        network.moments[shape] = Deviations(torch.tensor(2), zero, one)
    network.save(path, editor.hparams, records=0)
