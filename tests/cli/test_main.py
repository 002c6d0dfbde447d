"""The command line on a model that knows its facts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kmebench.cli import plan
from kmebench.cli.main import main
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.edits.edit import Edit
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.errors import ConfigError
from kmebench.models.editable import EditableModel
from kmebench.models.sources import save_model
from kmebench.planning.by_hand import find_model, method_of
from kmebench.planning.config import read_checked_config

FACT = ["--subject", "France", "--prompt", "The capital of {} is", "--target", "Rome"]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    save_model(trained.model, trained.tokenizer, path)
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr("kmebench.cli.terminal.console.width", 200)


def said(folder, prompt="The capital of France is"):
    """What plain transformers reads from a folder."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, do_sample=False, max_new_tokens=1, pad_token_id=0)[0, -1]
    return tokenizer.decode(new).strip()


def test_edit_shows_before_and_after_and_saves_a_model_that_transformers_reads(
    folder, tmp_path, capsys
):
    out, delta = tmp_path / "edited", tmp_path / "delta.safetensors"
    arguments = ["edit", "--model", str(folder), *FACT, "--set", "learning_rate=0.001"]
    assert main([*arguments, "--out", str(out), "--save-delta", str(delta)]) == 0
    shown = capsys.readouterr().out
    assert "' Paris'" in shown
    assert "' Rome'" in shown
    assert "The capital of Afghanistan is" in shown  # a neighbour, from OpenFacts
    assert said(folder) == "Paris"
    assert said(out) == "Rome"
    again = tmp_path / "applied"
    assert main(["apply", str(delta), "--model", str(folder), "--out", str(again)]) == 0
    one, other = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (out, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_long_target_that_is_written_is_said_to_be(folder, capsys):
    """An answer is shown to twelve tokens; this target has more."""
    fact = [*FACT[:-1], "the old Lima in Cuba, Tokyo of Peru in Rome"]
    values = ["--set", "steps=60", "--set", "learning_rate=0.003"]
    arguments = ["--model", str(folder), "--method", "lora", "--neighbour", "Cuba", *values]
    assert main(["edit", *fact, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "The fact is written;" in shown
    assert fact[-1] in shown


def test_edit_equals_the_editor(folder, tmp_path, capital_requests):
    out = tmp_path / "edited"
    options = ["--method", "full-c", "--set", "steps=3", "--set", "norm_constraint=None"]
    assert main(["edit", "--model", str(folder), *FACT, *options, "--out", str(out)]) == 0
    model = EditableModel.load(folder, device="cpu")
    editor = build_editor("full-c", {"steps": 3, "norm_constraint": None}, {})
    model.apply(editor.edit(model, capital_requests[:1]))
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=0, atol=1e-6)


def test_one_fact_is_edited_with_the_values_of_consecutive_editing_and_more_with_those_of_batches():
    config = read_checked_config(Path("config.yaml"))
    tuned = config["models"]["smollm2-135m"]["hparams"]["pac"]
    assert tuned["batch"]["learning_rate"] != tuned["learning_rate"]
    source = find_model("smollm2-135m")
    for mode, values in (("consecutive", tuned), ("batch", tuned["batch"])):
        method = method_of(source, "pac", {}, mode)
        assert method.editor == "pac"
        assert method.hparams["learning_rate"] == values["learning_rate"]


def test_edit_reads_the_covariance_from_a_file(folder, tmp_path, capsys):
    covariance, delta = tmp_path / "covariance.safetensors", tmp_path / "delta.safetensors"
    width = EditableModel.load(folder, device="cpu").ffn_width
    write_covariance(covariance, {1: torch.eye(width)}, 1, {})
    options = ["--method", "rome", "--set", "layer=1", "--set", "steps=2"]
    options += ["--covariance", str(covariance), "--save-delta", str(delta)]
    assert main(["edit", "--model", str(folder), *FACT, *options]) == 0
    assert "rome: 1 steps" in capsys.readouterr().out
    assert len(Edit.load(delta).weights) == 1


def test_a_folder_is_edited_with_the_methods_own_hyperparameters(folder, capsys):
    assert main(["edit", "--model", str(folder), *FACT, "--method", "full-c-epochs"]) == 0
    assert "full-c-epochs: 12 steps" in capsys.readouterr().out  # of config.yaml


class Ending(Editor):
    """Changes one weight when it edits and another when the run ends."""

    def edit(self, model, requests):
        return self._ones(model, 0)

    def final_edit(self, model):
        return self._ones(model, 1)

    def _ones(self, model, layer):
        name = model.ffn[layer].value.weight_name
        return WeightDelta({name: Dense(torch.ones(model.parameter(name).shape))})


def test_edit_ends_as_a_run_does(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kmebench.api.build_editor", lambda *_: Ending(None, {}))
    delta, out = tmp_path / "delta.safetensors", tmp_path / "edited"
    saved = ["--save-delta", str(delta), "--out", str(out)]
    assert main(["edit", "--model", str(folder), *FACT, *saved]) == 0
    names = [f.value.weight_name for f in EditableModel.load(folder, device="cpu").ffn[:2]]
    assert set(Edit.load(delta).weights) == set(names)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, out)
    )
    for name in names:
        torch.testing.assert_close(after[name], before[name] + 1)


def test_trace_shows_every_layer_and_draws(folder, tmp_path, capsys):
    plot = tmp_path / "layers.png"
    assert main(["trace", "--model", str(folder), *FACT, "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "of the impact (l2) on “Rome”" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "smollm", *FACT], "did you mean 'smollm2-135m'"),
        (["--model", "Tiny-GPTJ", *FACT], "did you mean 'tiny-gptj'"),
        (["--model", "config", *FACT], "config holds no Hugging Face model"),
        (["--model", "MODEL", *FACT, "--method", "pca"], "did you mean 'pac'"),
        (["--model", "MODEL", *FACT, "--method", "PAC"], "did you mean 'pac'"),
        (["--model", "MODEL", *FACT, "--set", "steps"], "not of the form NAME=VALUE"),
        (["--model", "MODEL", *FACT, "--set", "stepz=3"], "no hyper-parameter 'stepz'"),
        (["--model", "MODEL", *FACT, "--set", "steps=[1,2]"], "steps cannot be [1, 2]"),
        (["--model", "MODEL", *FACT, "--set", "steps=[1"], "the value cannot be read"),
        (["--model", "MODEL", *FACT[:2], "--prompt", "It is", *FACT[4:]], "holds no {}"),
        (["--model", "MODEL", *FACT, "--out", "MODEL"], "exists already"),
        (["--model", "MODEL", *FACT, "--out", "README.md/x"], "README.md is no folder"),
        (["--model", "MODEL", *FACT, "--save-delta", "docs"], "--save-delta names the folder docs"),
        (["--model", "MODEL", *FACT, "--neighbour", " "], "--neighbour is empty"),
        (["--model", "MODEL", *FACT, "--neighbour", "\ud800"], "half a surrogate pair"),
        (["--model", "MODEL", *FACT, "--device", "gpu"], "did you mean 'cuda'?"),
        (["--model", "MODEL", *FACT, "--dtype", "fp16"], "float32, bfloat16, float16"),
        (["--model", "MODEL", *FACT, "--covariance", "none"], "no such file"),
        (["--model", "MODEL", *FACT, "--config", "none.yaml"], "There is no config none.yaml"),
    ],
)
def test_errors_are_one_sentence(arguments, complaint, folder, capsys):
    refused(["edit", *(str(folder) if a == "MODEL" else a for a in arguments)], complaint, capsys)


def refused(arguments, complaint, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.startswith("kmebench: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--paths", "0"], "--paths cannot be '0': it is a whole number from 1"),
        (["--paths", "-3"], "--paths cannot be '-3'"),
        (["--paths", "some"], "--paths cannot be 'some'"),
        (["--paths", "9999"], "of this model has 512"),
        (["--plot", "layers.jpg"], "ends in .png, .pdf, .svg"),
        (["--plot", "layers"], "ends in .png, .pdf, .svg"),
        (["--plot", "no\0name.png"], "--plot cannot be"),
        (["--plot", "x" * 300 + ".png"], "File name too long"),
        (["--device", "cuda"], "The device 'cuda' is not there"),
    ],
)
def test_what_cannot_be_traced_or_drawn_is_one_sentence(
    arguments, complaint, folder, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refused(["trace", "--model", str(folder), *FACT, *arguments], complaint, capsys)


@pytest.mark.parametrize(
    ("delta", "complaint"),
    [
        ("none.safetensors", "there is no such file"),
        ("docs", "names the folder docs"),
        ("a\nb", "delta names a b, and there is no such file"),
        ("README.md", "README.md cannot be read as an edit"),
        ("MODEL/model.safetensors", "is not an edit of this program"),
    ],
)
def test_what_is_no_delta_is_one_sentence(delta, complaint, folder, tmp_path, capsys):
    path = delta.replace("MODEL", str(folder))
    arguments = ["apply", path, "--model", str(folder), "--out", str(tmp_path / "out")]
    refused(arguments, complaint, capsys)


def test_a_file_of_the_users_that_holds_no_covariance_stays_as_it_is(folder, tmp_path, capsys):
    covariance = tmp_path / "covariance.safetensors"
    arguments = ["edit", "--model", str(folder), *FACT, "--method", "rome"]
    covariance.write_text("no tensors")
    refused([*arguments, "--covariance", str(covariance)], "cannot be read as a file", capsys)
    assert covariance.read_text() == "no tensors"
    weights = folder / "model.safetensors"
    refused([*arguments, "--covariance", str(weights)], "is no file of covariances", capsys)
    assert weights.exists()


def test_a_damaged_file_of_covariances_of_the_users_stays_as_it_is(folder, tmp_path, capsys):
    covariance = tmp_path / "covariance.safetensors"
    write_covariance(
        covariance, {1: torch.eye(EditableModel.load(folder, device="cpu").ffn_width)}, 1, {}
    )
    damaged = covariance.read_bytes()[:-1] + b"\xff"
    covariance.write_bytes(damaged)
    arguments = ["edit", "--model", str(folder), *FACT, "--method", "rome", "--set", "layer=1"]
    refused([*arguments, "--covariance", str(covariance)], "is damaged (the checksum of", capsys)
    assert covariance.read_bytes() == damaged


def test_a_folder_that_may_not_be_written_to_is_found_before_the_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK)
    for option in ("--out", "--save-delta"):
        arguments = ["edit", "--model", str(folder), *FACT, option, str(tmp_path / "a/b")]
        refused(arguments, f"you may not write to {tmp_path}", capsys)


WRONG = [
    ["edit", "--model", "tiny-gptj", *FACT, "--set", "stepz=3"],
    ["edit", "--model", "tiny-gptjj", *FACT],
    ["edit", "--model", "tiny-gptj", *FACT, "--method", "memitt"],
    ["edit", "--model", "tiny-gptj", *FACT, "--config", "README.md"],
    ["trace", "--model", "tiny-gptj", *FACT, "--plot", "x.jpg"],
    ["apply", "none", "--model", "tiny-gptj", "--out", "none"],
    ["edit", "--model", "tiny-gptj", *FACT, "--set", "steps=-1"],
    ["check-config", "--configfile", "none.yaml"],
    ["check-config", "--explain", "tiny-gptj/memit/both"],
    ["plan", "--configfile", "none.yaml"],
    ["plan", "--measured", "none"],
    ["editors", "memitt"],
    ["evaluate", "none", "--tasks", "piqa"],
]
REFUSES = """
import json, sys
from kmebench.cli.main import main

for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 1
    slow = {"torch", "transformers", "pandas", "snakemake.cli", "lm_eval"} & {*sys.modules}
    assert not slow, (arguments, slow)
"""


def test_what_only_the_arguments_tell_is_said_before_anything_slow_is_imported():
    command = [sys.executable, "-c", REFUSES, json.dumps(WRONG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("(kmebench: .*\n){13}", done.stderr)


def test_a_fact_is_edited_with_an_overlay_over_the_config(folder, tmp_path, capsys):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("methods: {mine: {editor: full-c, hparams: {steps: 9, layers: [0]}}}")
    two.write_text("methods: {mine: {hparams: {steps: 2}}}")
    options = ["--method", "mine", "--set", "tolerance=0.0", "--configfile", str(one), str(two)]
    assert main(["edit", "--model", str(folder), *FACT, *options]) == 0
    assert "mine: 2 steps" in capsys.readouterr().out


@pytest.mark.integration
def test_a_model_that_only_an_overlay_defines_is_made(folder, tmp_path, capsys):
    """Why one could not be made: tests/planning/test_workflow.py."""
    overlay = tmp_path / "mine.yaml"
    places = {name: str(tmp_path / name) for name in ("results", "logs", "benchmarks")}
    models = {"mine": {"source": {"source": "folder", "path": str(folder)}}}
    overlay.write_text(json.dumps({"pathvars": places, "models": models}))
    assert main(["trace", *FACT, "--config", str(overlay), "--model", "mine"]) == 0
    assert "of the impact (l2)" in capsys.readouterr().out
    assert (tmp_path / "results/models/mine/config.json").is_file()


def test_brackets_and_dollars_of_a_prompt_are_shown_and_drawn_as_they_are(folder, tmp_path, capsys):
    plot = tmp_path / "layers.svg"
    fact = [*FACT[:2], "--prompt", "[/b] $\\frac$ :smile: {} is", *FACT[4:]]
    assert main(["trace", "--model", str(folder), *fact, "--plot", str(plot)]) == 0
    assert "[/b] $\\frac$ :smile: France is" in capsys.readouterr().out


def test_a_delta_of_another_model_is_refused(folder, make_model, requests, tmp_path, capsys):
    model = make_model("llama")
    delta = tmp_path / "delta.safetensors"
    build_editor("full-c", {"steps": 1}, {})(model, requests[:1]).edit.save(delta)
    out = ["--out", str(tmp_path / "out")]
    assert main(["apply", str(delta), "--model", str(folder), *out]) == 1
    assert "which this model lacks" in capsys.readouterr().err


def test_check_config_lists_the_grid_and_names_what_is_wrong(tmp_path, capsys):
    assert main(["check-config", "--configfile", "config/ci.yaml"]) == 0
    assert "table2" in capsys.readouterr().out
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("experiments: {table2: {methods: [memmit]}}")
    assert main(["check-config", "--configfile", str(wrong)]) == 1
    assert "did you mean 'memit'" in capsys.readouterr().err
    assert main(["check-config", "--configfile", str(tmp_path / "none.yaml")]) == 1
    assert "There is no config" in capsys.readouterr().err


def test_check_config_explains_where_values_come_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kmebench.cli.terminal.console.width", 200)
    mine = tmp_path / "mine.yaml"
    mine.write_text("models: {smollm2-135m: {hparams: {memit: {steps: 7}}}}")
    explain = ["check-config", "--configfile", str(mine), "--explain"]
    assert main([*explain, "smollm2-135m/memit/batch"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["steps", "7", str(mine), "models.smollm2-135m.hparams.memit.steps"] in shown
    key = "models.smollm2-135m.hparams.memit.stop_loss"
    assert ["stop_loss", "0.001", "config/tuned/smollm2-135m.memit.yaml", key] in shown
    assert ["clamp_factor", "4.0", *["default", "of", "the", "editor", "memit"]] in shown
    refused([*explain, "smollm2-135m/memmit/batch"], "did you mean 'memit'", capsys)


@pytest.mark.integration
def test_plan_counts_jobs_hours_and_disk(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kmebench.cli.terminal.console.width", 200)
    run = tmp_path / "runs/smollm2-135m/zsre/consecutive/pac/default/seed0"
    run.mkdir(parents=True)
    (run / "timing.json").write_text(
        '{"requests": 1, "seconds_per_edit": 2.0, "evaluation_seconds": 1.0}'
    )
    (run / "predictions.parquet").write_bytes(bytes(1000))
    few = tmp_path / "few.yaml"
    few.write_text("experiments: {table1: {methods: [pac]}, table2: {methods: [pac, full-c]}}")
    configs = ["config/paper.yaml", str(few)]
    arguments = ["plan", "--configfile", *configs, "--measured", str(tmp_path)]
    assert main([*arguments, "--devices", "1", "64"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^edit +\d+", shown, re.MULTILINE)
    assert re.search(r"^llama3-8b +consecutive +scaled", shown, re.MULTILINE)
    assert re.search(r"^llama3-8b +consecutive +unknown", shown, re.MULTILINE)
    one, many = re.search(r"1 device: ([\d.,]+) h.*\nOn 64 devices: ([\d.,]+) h", shown).groups()
    assert float(one.replace(",", "")) > float(many.replace(",", "")) > 0
    assert re.search(r"^gpt-j-6b +12\.10 ", shown, re.MULTILINE)  # GB of bfloat16 weights


def test_a_fact_is_edited_with_a_config_that_is_right(folder, tmp_path, capsys):
    bare = tmp_path / "config.yaml"
    bare.write_text(Path("config.yaml").read_text() + "\nmethodz: {}\n")
    assert main(["trace", "--model", str(folder), *FACT, "--configfile", str(bare)]) == 1
    assert "methodz" in capsys.readouterr().err


@pytest.mark.integration
def test_a_plan_is_made_where_the_workflow_is(tmp_path, monkeypatch, capsys):
    config = Path("config.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    refused(["plan"], "There is no Snakefile here", capsys)
    Path("Snakefile").write_text("rule: oops")
    Path("config.yaml").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"The workflow cannot be planned: .*oops"):
        plan._jobs([])


def test_plan_without_measurements_says_so(tmp_path, capsys):
    assert main(["plan", "--measured", str(tmp_path)]) == 1
    assert "no finished run below" in capsys.readouterr().err
