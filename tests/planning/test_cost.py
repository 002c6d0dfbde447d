"""What a grid costs, against numbers worked out by hand and shapes built by transformers."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from kmebench.planning import cost as plan
from kmebench.planning import grid
from kmebench.planning.config import read_checked_config

MODELS = {
    "small": {"dtype": "float32", "hparams": {}},
    "big": {
        "dtype": "bfloat16",
        "paper_name": "GPT-J (6B)",
        "shape": {"layers": 28, "width": 4096, "ffn_width": 16384, "parameters": 6_000_000_000},
        "hparams": {},
    },
    "other": {"dtype": "float32", "hparams": {}},
}
CONFIG = {
    "seed": 0,
    "batch_size": 100,
    "models": MODELS,
    "datasets": {"d": {"n": 10}, "e": {"n": 30}},
    "methods": {"pac": {}, "full-c": {}, "memit": {}},
    "experiments": {
        "table": {
            "mode": "consecutive",
            "models": ["small", "big", "other"],
            "datasets": ["d", "e"],
            "methods": ["pac", "memit"],
            "seeds": [0],
        },
        "batch": {
            "mode": "batch",
            "models": ["big"],
            "datasets": ["d"],
            "methods": ["full-c"],
            "seeds": [0],
        },
    },
    "comparisons": {},
}


def timing(root: Path, dataset, method, seconds, evaluation=None, n=10, model="small"):
    run = root / "runs" / model / dataset / "consecutive" / method / "default" / "seed0"
    run.mkdir(parents=True)
    noted = {"requests": n, "seconds_per_edit": seconds}
    if evaluation is not None:
        noted["evaluation_seconds"] = evaluation
    (run / "timing.json").write_text(json.dumps(noted))
    (run / "predictions.parquet").write_bytes(b"x" * 100 * n)


@pytest.fixture
def measured(tmp_path):
    timing(tmp_path, "d", "pac", 1.0, evaluation=20.0)  # 2 s per edit
    timing(tmp_path, "e", "pac", 3.0, evaluation=40.0)  # 4 s per edit
    timing(tmp_path, "d", "memit", 5.0)
    return plan.measurements([tmp_path])


def test_measurements_are_per_edit(measured):
    pac = measured.query("method == 'pac' and dataset == 'd'").iloc[0]
    assert (pac["editing"], pac["evaluation"], pac["predictions"]) == (1.0, 2.0, 100.0)
    assert measured.query("method == 'memit'")["evaluation"].isna().all()


def test_costs_are_measured_scaled_by_the_paper_or_unknown(measured):
    costs = plan.run_costs(CONFIG, measured).set_index(["model", "dataset", "method"])
    small = costs.loc["small", "d", "pac"]
    assert small["source"] == "measured"
    assert small["editing"] == pytest.approx(2.0 * 10 / 3600)  # the median of 1 and 3
    assert small["hours"] == pytest.approx((2.0 + 3.0) * 10 / 3600)

    paper = pd.read_csv("resources/paper/time.csv").query("editor == 'Ours'")
    gptj = paper.set_index("model")["seconds_per_edit"]["GPT-J (6B)"]
    big = costs.loc["big", "e", "memit"]
    assert big["source"] == "scaled"
    assert big["editing"] == pytest.approx(5.0 * gptj / 2.0 * 30 / 3600)
    assert pd.isna(big["evaluation"])  # nobody has measured how long MEMIT's questions take
    assert big["hours"] == big["editing"]

    assert costs.loc["other", "d", "pac"]["source"] == "unknown"
    assert costs.loc["big", "d", "full-c"]["source"] == "unknown"
    assert costs.loc["other"]["hours"].isna().all()


def test_a_measured_model_without_pac_is_no_reference_and_hides_none(tmp_path, measured):
    before = plan.run_costs(CONFIG, measured)
    for method in ("memit", "full-c", "rome"):  # more than of the model that has PAC
        timing(tmp_path, "d", method, 7.0, model="partial")
    after = plan.run_costs(CONFIG, plan.measurements([tmp_path]))
    assert {"scaled", "measured"} <= set(before["source"])
    pd.testing.assert_frame_equal(before, after)


def test_nothing_is_scaled_where_no_model_has_pac(tmp_path):
    timing(tmp_path, "d", "memit", 7.0)
    costs = plan.run_costs(CONFIG, plan.measurements([tmp_path]))
    assert set(costs["source"]) == {"measured", "unknown"}
    assert set(plan.run_costs(CONFIG, plan.measurements([]))["source"]) == {"unknown"}


def test_a_grid_ends_with_its_longest_run():
    costs = pd.DataFrame({"hours": [5.0, 3.0, 3.0, 2.0, float("nan")]})
    assert [plan.wall_hours(costs, n) for n in (1, 2, 3, 64)] == [13.0, 7.0, 5.0, 5.0]


def test_disk(measured):
    sizes = plan.disk(CONFIG, measured).set_index("model")
    big = sizes.loc["big"]
    matrix = 4096 * 16384 * 4
    assert big["weights"] == 12_000_000_000
    # dF of two projections, edit and locality prompt, 28 layers, float32, of 10 and 30 records
    assert big["gradients"] == 40 * 2 * 2 * 28 * 16384 * 4
    # PAC may change both matrices of all layers, MEMIT those of its layers; on two data sets;
    # the delta of a batch is not saved.
    memit_layers = 5  # the editor's default
    assert big["deltas"] == matrix * 2 * (2 * 28 + memit_layers)
    assert big["predictions"] == 100 * (40 + 40 + 10)
    assert pd.isna(sizes.loc["small", "weights"])


def test_matrices_are_counted_of_each_kind_whose_layers_are_named():
    config = copy.deepcopy(CONFIG)
    config["methods"]["ultraedit"] = {"hparams": {"value_layers": [1, 2], "gate_layers": [1]}}
    run = grid.Run("big", "zsre", "consecutive+turn=50", "ultraedit", "default", 0)
    assert plan._matrices(config, run, 28) == 3


GPTJ = GPTJConfig()  # its defaults are those of EleutherAI/gpt-j-6B
LLAMA2 = LlamaConfig()  # of meta-llama/Llama-2-7b-hf
LLAMA3 = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("overlays", "name", "architecture"),
    [
        ([], "smollm2-135m", SMOLLM2),
        (["config/paper.yaml"], "gpt-j-6b", GPTJ),
        (["config/paper.yaml"], "llama2-7b", LLAMA2),
        (["config/paper.yaml"], "llama3-8b", LLAMA3),
    ],
)
def test_shapes_in_the_config_are_those_of_the_architectures(overlays, name, architecture):
    config = read_checked_config(Path("config.yaml"), [Path(p) for p in overlays])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    assert config["models"][name]["shape"] == {
        "layers": architecture.num_hidden_layers,
        "width": architecture.hidden_size,
        "ffn_width": getattr(architecture, "intermediate_size", None) or 4 * architecture.n_embd,
        "parameters": model.num_parameters(),
    }
