"""A device like a GPU: its tensors do not mix with the CPU's. Run by test_other_device.py.

With the argument ``single`` it has no float64, as Apple's.

What lies on ``card`` are the CPU's own tensors under another name, so all operations give what they
give there; but one that is handed tensors of both devices fails as on CUDA, except an index.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import library
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import Gemma3TextConfig, GPTJConfig, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from kmebench import precision
from kmebench.data.records import EditRequest, write_requests
from kmebench.editors import contexts
from kmebench.editors.base import build_editor
from kmebench.editors.cards import registered
from kmebench.editors.contexts import Contexts, sample_contexts
from kmebench.editors.hyper.training import train
from kmebench.editors.locate.covariance.stage import Sums
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.covariance.texts import Sampled
from kmebench.editors.needs import NeutralMetric
from kmebench.editors.pac.neutral import write_metric
from kmebench.evaluation.health import NeutralSettings, NeutralText, health
from kmebench.models.editable import EditableModel
from kmebench.models.tiny import train_tokenizer
from tests.encoders import write_encoder

#: The value to write, if there is one, must lie with what it is written to.
INDEXING = {
    "aten.index.Tensor": 1,
    "aten._index_put_impl_.default": 3,
    "aten.index_put_.default": 3,
}


#: What the card cannot hold.
REFUSED: set[torch.dtype] = set()


class Card(torch.Tensor):
    """A tensor on ``card``; ``raw`` holds its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(raw: torch.Tensor) -> "Card":
        if raw.dtype in REFUSED:
            raise TypeError(f"the card has no {raw.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(
            Card,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device="card:0",
        )
        tensor.raw = raw
        return tensor

    def tolist(self):
        return self.raw.tolist()

    def __format__(self, spec):
        return format(self.raw, spec)

    def numpy(self):
        raise TypeError("a tensor of the card has to be copied to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, *args, **(kwargs or {}))


def run(func, *args, **kwargs):
    """Run an operation; its results lie where its tensors do, or where it is told."""
    name = str(func)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name == "aten.copy_.default":
        raw(args[0]).copy_(raw(args[1]))
        return args[0]
    if name != "aten._to_copy.default":
        refuse_mixed(name, args, tensors)
    on_card = any(isinstance(x, Card) for x in tensors)
    if kwargs.get("device") is not None:
        on_card = torch.device(kwargs["device"]).type == "card"
        kwargs["device"] = "cpu"
    own = {id(x.raw): x for x in tensors if isinstance(x, Card)}  # what is changed in place
    with torch.no_grad():
        result = func(*pytree.tree_map(raw, args), **pytree.tree_map(raw, kwargs))

    def put(x):
        if not isinstance(x, torch.Tensor) or not on_card:
            return x
        return own[id(x)] if id(x) in own else Card.of(x)

    return pytree.tree_map(put, result)


def raw(value):
    return value.raw if isinstance(value, Card) else value


def refuse_mixed(name, args, tensors) -> None:
    if name in INDEXING:
        tensors = [x for x in args[: INDEXING[name]] if isinstance(x, torch.Tensor)]
    devices = {x.device for x in tensors if x.dim() > 0}  # a number may come from the CPU
    if len(devices) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{name} is handed tensors of two devices: {shapes}")


def register() -> library.Library:
    """Make ``card`` a device of this process, for as long as what is returned is kept."""
    _setup_privateuseone_for_python_backend("card")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="card") copies, as we do
    held = library.Library("_", "IMPL")
    held.fallback(run, "PrivateUse1")
    return held


# -- every editor on it ---------------------------------------------------------------

TEXTS = ["The capital of France is Paris.", "The capital of Italy is Rome."]
REQUESTS = [
    EditRequest("a", "France", "The capital of {} is", "Rome", "Paris"),
    EditRequest("b", "Italy", "What is the capital of {}?", "Paris", "Rome"),
]
UNRELATED = EditRequest("d", "Rome", "Where is {}?", "x", "y", (), (("Paris", "z"),))
LEARNT = [
    replace(r, paraphrases=(r.filled_prompt,), locality=((other.filled_prompt, other.target_true),))
    for r, other in zip(REQUESTS, REQUESTS[::-1], strict=True)
]
#: Editors by family; GPT-J has biases, which some of them move, Gemma a norm behind its FFN.
ASKED = {
    "llama": tuple(n for n, card in registered().items() if not card.control),
    "gptj": ("pac", "pac-released", "lora"),
    "gemma3": ("memit", "pmet"),
}
NETWORK = {"rank": 2, "steps": 2, "edits": 1, "groups": 2}
HPARAMS = {
    "pac": {"trace_on": "current", "selection": "kbest", "paths": 3, "steps": 2},
    "pac-released": {"epochs": 2, "paths": 3},
    "ft-l": {"layer": 0, "steps": 2},
    "ft-m": {"layer": 0, "steps": 2, "norm_constraint": 1e-4},
    "locft-bf": {"layer": 0, "steps": 2, "parameters": "layer"},
    "crispedit": {"layers": (0,), "steps": 2, "mini_batch": 1, "project": "update"},
    "grace": {"layer": 0, "steps": 2},
    "wise": {"layer": 0, "steps": 2, "shard_edits": 1, "merged_shards": 1},
    "memoir": {"layer": 0, "steps": 2},
    "ike": {"demonstrations": 0},
    "serac": {},
    "kn": {"prompts": 2, "steps": 2},
    "stableedit": {"value_layers": (0,)},
    "ultraedit": {"value_layers": (0,), "key_layers": (0,), "gate_layers": (0,)},
    "mend": {"value_layers": (0,), "key_layers": (0,), "gate_layers": (0,)} | NETWORK,
    "malmen": {"value_layers": (0,), "key_layers": ()} | NETWORK,
    "npac": {"layers": (0,), "matrices": "both", "paths": 5, "steps": 2},
}
METRIC = NeutralMetric((0,), 254)


def model_on_card(family: str) -> EditableModel:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if family != "gptj":
        size |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    else:
        size |= {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    config = {"llama": LlamaConfig, "gptj": GPTJConfig, "gemma3": Gemma3TextConfig}[family](**size)
    return EditableModel(AutoModelForCausalLM.from_config(config).to("card"), tokenizer)


def moments(model: EditableModel, path: Path) -> Path:
    sums = Sums(model, (0,))
    Sampled(8, 12, 0).feed(model, (0,), sums.add)
    sums.settle()
    for total in sums.total.values():
        total.diagonal().add_(1e-3)
    write_covariance(path, {k: v.float() for k, v in sums.total.items()}, 96, {"source": "self"})
    return path


def edit_twice(model: EditableModel, name: str, files: dict[str, Path]) -> None:
    hparams = HPARAMS.get(name, {"steps": 2})
    if registered()[name].family == "locate":
        hparams |= {"layer": 0} if "rome" in name else {"layers": (0,)}
    if name in ("alphaedit", "betaedit"):
        hparams |= {"threshold": 1.0}
    if registered()[name].family == "hyper":
        path = files["covariance"].with_name(f"{name}.network")
        train(
            path, path.with_suffix(".json"), model, LEARNT, build_editor(name, hparams, {}), code={}
        )
        files |= {"hypernetwork": path}
    editor = build_editor(name, hparams, files)
    for batch in (REQUESTS, REQUESTS[:1]):
        delta = editor.edit(model, batch)
        assert delta.is_finite()
        model.apply(delta)
    model.apply(editor.final_edit(model))
    total = model.edits.total().weights
    moved = sum(total.norms().values())
    assert moved > 0 or model.edits.overlays
    model.edits.load_state({k: v.cpu() for k, v in model.edits.state().items()})
    model.revert()


def few_contexts(model: EditableModel, lengths: object, seed: int) -> Contexts:
    """One text of two tokens: the second is sampled."""
    return sample_contexts(model, ((2, 1),), seed)


def edit_all(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for family, names in ASKED.items():
            model = model_on_card(family)
            assert model.device.type == "card"
            path = moments(model, Path(folder, f"{family}.safetensors"))
            metric = Path(folder, f"{family}-metric.safetensors")
            write_metric(metric, model, METRIC)
            encoder = write_encoder(Path(folder, "encoder"), model.tokenizer)
            files = {"covariance": path, NeutralMetric.asset: metric, "encoder": encoder}
            files["development"] = Path(folder, "development.jsonl")
            write_requests(files["development"], [UNRELATED])
            for name in names:
                edit_twice(model, name, files)
                print(kind, family, name, flush=True)
            neutral = NeutralText.written_by(model, NeutralSettings(texts=2, length=4, seed=0), 2)
            assert health(model, neutral, 2)["kl"] == 0.0


def main() -> None:
    kept, contexts.sample_contexts = register(), few_contexts
    edit_all("double")
    REFUSED.add(torch.float64)
    precision.SINGLE.add("card")
    edit_all("single")
    del kept


if __name__ == "__main__":
    sys.exit(main())
