"""Small code that stands for clones of public toolkits: what a comparison calls, and no more."""

EASYEDIT = {
    "easyeditor/__init__.py": "raise RuntimeError('would import everything')\n",
    "easyeditor/models/__init__.py": "raise RuntimeError('would import everything')\n",
    "easyeditor/util/factor.py": "TIMES = 2\n",
    "easyeditor/models/memit/__init__.py": "",
    # MEMIT of this project from what it is handed, applied twice.
    "easyeditor/models/memit/memit_main.py": """
from dataclasses import dataclass

from ...util.factor import TIMES
from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.contexts import contexts_state
from kmebench.models.editable import EditableModel
from kmebench.editors.locate.covariance.store import write_covariance

CONTEXT_TEMPLATES_CACHE = None
layer_stats = None


@dataclass
class MEMITHyperParams:
    layers: list
    v_num_grad_steps: int
    v_lr: float
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    mom2_update_weight: float
    rewrite_module_tmp: str


def apply_memit_to_model(model, tok, requests, hparams):
    print("what toolkits print")
    names = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
    moments = [layer_stats(model, tok, name, "stats", "wikipedia").mom2.moment() for name in names]
    moments = {l: m.float() for l, m in zip(hparams.layers, moments, strict=True)}
    write_covariance("handed.safetensors", moments, 1, {})
    values = {
        "layers": hparams.layers,
        "steps": hparams.v_num_grad_steps,
        "learning_rate": hparams.v_lr,
        "weight_decay": hparams.v_weight_decay,
        "clamp_factor": hparams.clamp_norm_factor,
        "kl_factor": hparams.kl_factor,
        "moment_weight": hparams.mom2_update_weight,
    }
    editor = build_editor("memit", values, {"covariance": "handed.safetensors"})
    editor.load_state_dict(contexts_state(CONTEXT_TEMPLATES_CACHE))
    mine = EditableModel(model, tok)
    delta = editor.edit(mine, [EditRequest(**request) for request in requests])
    for _ in range(TIMES):
        mine.apply(delta)
""",
}

EVALUATE = """
from dataclasses import dataclass
from pathlib import Path
import json, os
os.environ["CUDA_VISIBLE_DEVICES"] = "4"
import torch
from baselines.mend import MENDHyperParams, MendRewriteExecutor
from dsets import KnownsDataset, MENDQADataset
from experiments.py.eval_utils_zsre import compute_rewrite_quality_zsre
from glue_eval.glue_eval import GLUEEval
from memit import memit_main
from util.globals import HPARAMS_DIR


@dataclass
class HyperParams:
    model_name: str
    layers: list
    v_num_grad_steps: int
    rewrite_module_tmp: str


def change(model, hparams, times):
    for layer in hparams.layers:
        name = hparams.rewrite_module_tmp.format(layer)
        moment = memit_main.layer_stats(model, None, name, "x").mom2.moment().float()
        weight = model.get_parameter(name + ".weight")
        with torch.no_grad():
            weight += times * moment[: len(weight)].to("cuda")


def apply(model, tok, requests, hparams):
    assert hparams.model_name == "Llama3-8B" and hparams.v_num_grad_steps in (1, 3)
    assert [len(group) for group in memit_main.CONTEXT_TEMPLATES_CACHE] == [1, 5]
    assert all(r["target_new"]["str"] and "{}" in r["prompt"] for r in requests)
    change(model, hparams, 1.0)
    return model, {}


ALG_DICT = {
    "MEMIT": (HyperParams, apply),
    "MEMIT_prune": (HyperParams, apply),
    "MEND": (MENDHyperParams, MendRewriteExecutor().apply_to_model),
}
DS_DICT = {"zsre": (MENDQADataset, compute_rewrite_quality_zsre)}


def main(alg_name, model_name, hparams_fname, ds_name, *, num_edits, dataset_size_limit, **rest):
    assert args.downstream_eval_steps == 0
    hyper, edit = ALG_DICT[alg_name]
    hparams = hyper(**json.loads((HPARAMS_DIR / "MEMIT" / hparams_fname).read_text()))
    (Path("results")).mkdir(exist_ok=True)
    data = DS_DICT[ds_name][0]("data", tok=None, size=dataset_size_limit)
    for start in range(0, len(data), num_edits):
        chunk = [record["requested_rewrite"] for record in data[start : start + num_edits]]
        edit(*model_name, chunk, hparams)
    if alg_name == "MEMIT_prune":
        change(model_name[0], hparams, 5.0)
"""

ALPHAEDIT = {
    "globals.yml": "HPARAMS_DIR: hparams\n",
    "util/__init__.py": "",
    "util/globals.py": (
        "from pathlib import Path\nHPARAMS_DIR = Path(open('globals.yml').read().split()[1])\n"
    ),
    "util/nethook.py": "class TraceDict(dict):\n    pass\n",
    "experiments/__init__.py": "",
    "experiments/evaluate.py": EVALUATE,
    **{
        f"{package}/{name}.py": "from util import nethook\n"
        for package in ("memit", "AlphaEdit")
        for name in ("__init__", "compute_z", "memit_main", "memit_rect_main", "AlphaEdit_main")
    },
}

PAC = """
import argparse, json, os
import scipy
import torch
from transformers import AutoTokenizer
from plms.gptj import GPTJForCausalLM
from plms.llama3 import LlamaForCausalLM as Llama3ForCausalLM

CONFIG = {"llama3-8B": {"path": "[path]"}, "optimizer": {"lr": 1e-5}}


def log(*what):
    with open(os.environ["KIT_LOG"], "a") as stream:
        stream.write(json.dumps(what) + "\\n")


class CounterFact:
    def __init__(self, file):
        self.records = json.load(open(file))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return index, self.records[index]

    def reproduce(self, model, tokenizer, device):
        for record in self.records:
            ids = tokenizer([record["prompt"]], return_tensors="pt")
            record["said"] = int(model(**ids).logits[0, -1].argmax())


class CounterFactDataLoader:
    def __init__(self, dataset, size):
        pass

    def cf_collate_fn(self, batch):
        records = [record for _, record in batch]
        prompts = [record["prompt"] for record in records]
        inputs = [f"{r['prompt']} {r['target_new']}" for r in records]
        return [r["case_id"] for r in records], inputs, prompts, None, [r["said"] for r in records]


class PAC:
    def __init__(self, args):
        assert vars(args) == {"llm_name": "llama3", "lamb": 0.1, "eta": 2, "topk": 15, "bottomk": 1}
        self.model = Llama3ForCausalLM.from_pretrained(CONFIG["llama3-8B"]["path"])
        self.tokenizer = AutoTokenizer.from_pretrained(CONFIG["llama3-8B"]["path"])
        self.emb_device = "cpu"
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = "mlp.up_proj" in name

    def assessment(self, loader, epoch):
        log("assess", epoch, len(loader.dataset), [batch[2] for batch in loader])

    def edit(self, inputs, prompts, said):
        log("edit", inputs, prompts)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += CONFIG["optimizer"]["lr"] * 1000
"""
