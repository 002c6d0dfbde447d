"""The benchmarks run: on a small random model, in seconds. Their figures mean nothing here."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml
from transformers import GPTJConfig, LlamaConfig

from kmebench.editors.base import build_editor
from kmebench.experiments.grid import LOCATE_AND_EDIT

SMALL = {
    "llama": lambda: LlamaConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "gptj": lambda: GPTJConfig(n_embd=16, n_inner=64, n_layer=2, n_head=2, rotary_dim=4),
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")

    def run(script: str, *arguments: str) -> None:
        common = importlib.import_module("common")
        monkeypatch.setattr(common, "ARCHITECTURES", SMALL)
        monkeypatch.setattr(common, "bandwidth", lambda device: 1e10)
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", "--repeats", "1", *arguments])
        importlib.import_module(script).main()

    yield run
    scripts = ("common", "pac_step", "pac_edit", "dense_released", "editors", "targets", "long_run")
    for name in scripts:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", SMALL)
def test_pac_step_prints_a_row_for_every_size(family, benchmark, capsys):
    benchmark("pac_step", "--architecture", family, "--sizes", "1", "3", "--steps", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["1", "3"]
    assert "PAC step (ms)" in lines[0]


@pytest.mark.parametrize("family", SMALL)
def test_pac_edit_prints_a_row_for_every_editor_and_size(family, benchmark, capsys):
    benchmark("pac_edit", "--architecture", family, "--sizes", "1", "2", "--steps", "2")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].strip() for line in table[2:]]
    editors = ["PAC", "PAC, learning rate 1e-3", "PAC, learning rate 2e-3"]
    editors += ["PAC, released schedule", "PAC, released schedule, dense", "Full-C"]
    assert named == [editor for editor in editors for _ in range(2)]


@pytest.mark.parametrize("family", SMALL)
def test_editors_prints_a_row_for_every_configured_method(family, benchmark, capsys, tmp_path):
    config = yaml.safe_load(Path("config.yaml").read_text())
    for name, method in config["methods"].items():
        editor = build_editor(method.get("editor", name), {}, {})
        fields = vars(editor.hparams)
        few = {"steps": 2, "epochs": 1, "layer": 1, "clamp_factor": 1.0}
        hparams = {key: value for key, value in few.items() if key in fields}
        hparams |= {"layers": [1]} if name in LOCATE_AND_EDIT and "layers" in fields else {}
        method["hparams"] = method.get("hparams", {}) | hparams
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    arguments = ("--architecture", family, "--sizes", "1", "2")
    benchmark("editors", *arguments, "--config", str(tmp_path / "config.yaml"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].strip() for line in table[2:]]
    assert named == [method for method in config["methods"] for _ in range(2)]


@pytest.mark.parametrize("method", ["pac", "lora"])
def test_long_run_prints_a_row_for_every_stretch(method, benchmark, capsys):
    arguments = ("--architecture", "gptj", "--method", method, "--edits", "6", "--every", "2")
    arguments += ("--steps", "2")
    benchmark("long_run", *arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1 to 2", "3 to 4", "5 to 6"]


@pytest.mark.parametrize("family", SMALL)
def test_targets_are_the_same_in_all_ways(family, benchmark, capsys):
    sizes = ("--requests", "3", "--steps", "3", "--layer", "0")
    benchmark("targets", "--architecture", family, "--dtype", "float64", *sizes)
    lines = capsys.readouterr().out.splitlines()
    gaps = [float(line.rpartition(" ")[2]) for line in lines[:2]]
    assert max(gaps) < 1e-6
    assert len([line for line in lines if line.startswith("|")]) == 5
