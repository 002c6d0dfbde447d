"""The paper's three architectures, two random layers each, through every stage."""

import json

import pytest
import torch
from transformers import GPTJConfig, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from kmebench.data.records import write_requests
from kmebench.editors.base import build_editor
from kmebench.editors.cards import registered
from kmebench.editors.hyper.training import train
from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.editors.needs import NeutralMetric, Paths
from kmebench.editors.pac.cache import GradientCache, cache_gradients, select_groups, write_paths
from kmebench.editors.pac.neutral import write_metric
from kmebench.edits.edit import Edit
from kmebench.evaluation.frames import original_frame, write_frame
from kmebench.evaluation.predict import Settings
from kmebench.evaluation.schema import ORIGINAL
from kmebench.evaluation.score import read_predictions, score_experiment
from kmebench.io.parts import Parts
from kmebench.models.editable import EditableModel
from kmebench.pipelines.run import run_cell


def llama(**sizes):
    return LlamaConfig(num_hidden_layers=2, hidden_act="silu", **sizes)


# Real head counts and activation; widths scaled down, in proportion.
ARCHITECTURES = {
    "gpt-j-6b": lambda v: GPTJConfig(
        vocab_size=v, n_embd=64, n_inner=256, n_layer=2, n_head=16, rotary_dim=4, n_positions=256
    ),
    "llama2-7b": lambda v: llama(
        vocab_size=v,
        hidden_size=128,
        intermediate_size=344,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-5,
    ),
    "llama3-8b": lambda v: llama(
        vocab_size=v,
        hidden_size=128,
        intermediate_size=448,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
BOTH_LAYERS = {"layers": [0, 1], "steps": 2}
NETWORK = {"value_layers": [0, 1], "key_layers": [], "rank": 4, "steps": 2, "edits": 1, "groups": 2}
#: Each runs on Llama 3 in bfloat16.
EDITORS = {
    "pac": {"steps": 3},
    "pac-released": {"epochs": 2, "paths": 3},
    "npac": {"layers": [0, 1], "share": 0.5, "steps": 2},
    "full-c": {"steps": 2, "learning_rate": 1e-3},
    "ft-l": {"layer": 1, "steps": 2},
    "ft-m": {"layer": 1, "steps": 2, "mini_batch": 2, "norm_constraint": 1e-4},
    "locft-bf": {"layer": 1, "steps": 2, "parameters": "layer"},
    "crispedit": {"layers": [0, 1], "steps": 2},
    "rome": {"layer": 1, "steps": 2},
    "r-rome": {"layer": 1, "steps": 2},
    "memit": BOTH_LAYERS,
    "memit-seq": BOTH_LAYERS,
    "encore": BOTH_LAYERS,
    "pmet": BOTH_LAYERS,
    "emmet": {"layers": [1], "steps": 2},
    "alphaedit": BOTH_LAYERS | {"threshold": 1e-3},
    "betaedit": BOTH_LAYERS | {"threshold": 1e-3},
    "prune": BOTH_LAYERS,
    "rect": BOTH_LAYERS,
    "kn": {"steps": 2, "prompts": 2},
    "lora": {"steps": 2},
    "lora-merge": {"steps": 2},
    "grace": {"layer": 1, "steps": 2},
    "wise": {"layer": 1, "steps": 2, "shard_edits": 1},
    "memoir": {"layer": 1, "steps": 2},
    "ike": {"demonstrations": 2},
    "serac": {},
    "ultraedit": {"value_layers": [1], "key_layers": [1], "gate_layers": [0]},
    "stableedit": {"value_layers": [1], "key_layers": [1], "gate_layers": [0]},
    "mend": NETWORK | {"key_layers": [1]},
    "malmen": NETWORK,
    "none": {},
}


#: These run by every pipeline.
EVERY_MODE = ("pac", "pac-released", "full-c", "ft-l", "ft-m", "locft-bf", "crispedit")


def test_every_editor_is_among_them():
    assert set(EDITORS) == set(registered())


@pytest.mark.integration
@pytest.mark.parametrize(
    ("architecture", "dtype", "editors"),
    [
        # GPT-J has biases.
        ("gpt-j-6b", "bfloat16", ("pac", "pac-released", "lora", "memit", "locft-bf")),
        ("llama2-7b", "float32", ("pac", "rome", "memit")),
        ("llama3-8b", "bfloat16", tuple(EDITORS)),
    ],
)
def test_a_paper_architecture_passes_through_every_stage(
    architecture, dtype, editors, tokenizer, requests, encoder_folder, tmp_path
):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](len(tokenizer))).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)

    def load():
        return EditableModel.load(folder, dtype=dtype, device="cpu")

    model, settings = load(), Settings(wild_max_tokens=4)
    write_frame(original_frame(model, requests, settings), ORIGINAL, tmp_path / "original.parquet")
    cache_gradients(Parts(tmp_path / "gradients.safetensors", {}), model, requests)
    cache = GradientCache.open(tmp_path / "gradients.safetensors")
    paths = Paths("l2", 1, "disjoint", 15, 1)
    write_paths(tmp_path / "paths.safetensors", select_groups(cache, paths), cache, paths)
    text = TextSettings(tokens=2048, length=64, batch_size=32)
    measure_covariance(tmp_path / "covariance.safetensors", model, [0, 1], text)
    if "npac" in editors:
        write_metric(tmp_path / "neutral_metric.safetensors", model, NeutralMetric((0, 1), 254))
    write_requests(tmp_path / "d.jsonl", requests)
    for editor in {"mend", "malmen"} & set(editors):
        network = build_editor(editor, EDITORS[editor], {})
        train(
            tmp_path / f"{editor}.network", tmp_path / "history", model, requests, network, code={}
        )
    runs, files = [], []
    for editor in editors:
        every = ("batch", "consecutive", "breadth_first")
        for mode in every if editor in EVERY_MODE else ("consecutive",):
            output = {
                name: str(tmp_path / editor / mode / file)
                for name, file in (
                    ("predictions", "predictions.parquet"),
                    ("timing", "timing.json"),
                    ("run", "run.json"),
                    ("delta", "delta.safetensors"),
                    ("health", "health.json"),
                    ("norms", "norms.parquet"),
                )
            }
            run_cell(
                load,
                requests,
                {
                    "mode": mode,
                    "editor": editor,
                    "hparams": EDITORS[editor],
                    "seed": 0,
                    "batch_size": 2,
                    "checkpoint_every": 2,
                    "milestone_sample": None,
                    "on_failed_edit": "error",
                    "on_bad_record": "error",
                    "evaluation": {"batch_size": 8, "wild_max_tokens": 4},
                },
                assets={
                    name: str(tmp_path / f"{name}.safetensors")
                    for name in ("paths", "covariance", "neutral_metric")
                }
                | {
                    "encoder": str(encoder_folder),
                    "development": str(tmp_path / "d.jsonl"),
                    "hypernetwork": str(tmp_path / f"{editor}.network"),
                },
                original=str(tmp_path / "original.parquet"),
                inputs={"code": [__file__]},
                output=output,
            )
            runs.append({"model": "m", "dataset": "d", "mode": mode, "method": editor})
            files.append(output)
    for spec, output in zip(runs, files, strict=True):
        _check(spec, output)
    # Scores are made of predictions, which have the same columns whatever the editor is.
    scored = [(spec, f) for spec, f in zip(runs, files, strict=True) if spec["method"] == "pac"]
    metrics = score_experiment(
        "e",
        [spec | {"variant": "default", "seed": 0} for spec, _ in scored],
        [output["predictions"] for _, output in scored],
        [output["timing"] for _, output in scored],
        [{"model": "m", "dataset": "d"}],
        [tmp_path / "original.parquet"],
        {"resamples": 10, "seed": 0},
    )
    final = metrics[metrics["when"] == "final"]
    assert set(final["mode"]) == {"batch", "consecutive", "breadth_first"}
    for _, of_run in final.groupby(["method", "mode"]):
        assert set(of_run["protocol"]) == {"token", "exact", "free", "wild", "probability"}
        assert of_run["value"].between(0, 1).all()


def _check(spec, output):
    with open(output["timing"], encoding="utf-8") as stream:
        timing = json.load(stream)
    assert timing["requests"] == 3
    assert timing["seconds_per_edit"] == pytest.approx(sum(timing["seconds"].values()))
    frame = read_predictions(output["predictions"])
    if spec["mode"] == "consecutive":
        assert set(frame["when"]) == {"final", "write", "milestone"}
        edit = Edit.load(output["delta"])
        assert edit.weights.norms() or edit.overlays or spec["method"] == "none"
    elif spec["mode"] == "breadth_first":
        assert set(frame["when"]) == {"final"}
        assert Edit.load(output["delta"]).weights.norms()
    else:
        assert set(frame["batch"]) == {0, 1}
