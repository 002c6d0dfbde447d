"""``kmebench evaluate``: lm-evaluation-harness on a local task, without a network."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kmebench.cli.main import main
from kmebench.errors import ConfigError
from kmebench.evaluation import harness
from kmebench.models.sources import save_model

TASKS = Path("tests/data/harness")
NOTEBOOK = Path("notebooks/extra/evaluate_an_edit.ipynb")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "model"
    save_model(trained.model, trained.tokenizer, path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_without_the_extra_a_sentence_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["evaluate", str(tmp_path), "--tasks", "piqa"]) == 1
    assert capsys.readouterr().err == (
        "kmebench: kmebench evaluate needs lm-evaluation-harness: "
        "pip install 'kmebench[evaluate]'.\n"
    )


def test_scores_are_those_of_tasks_and_groups_in_order():
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "b": {"exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A"},
        },
        "groups": {"g": {"acc,none": 0.75, "acc_stderr,none": 0.2}},
        "n-samples": {"a": {"effective": 4}, "b": {"effective": 2}},
    }
    rows = [(s.task, s.metric, s.value, s.stderr, s.documents) for s in harness.scores(found)]
    assert rows == [
        ("a", "acc", 0.5, 0.1, 4),
        ("b", "exact_match, strict", 1.0, None, 2),
        ("g", "acc", 0.75, 0.2, None),
    ]


def chosen(folder, document):
    """The choice that plain transformers gives the largest probability."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    asked = len(tokenizer(document["question"])["input_ids"])
    scores = []
    for choice in document["choices"]:
        ids = tokenizer(f"{document['question']} {choice}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(dim=-1)
        told = logs.gather(1, ids[0, 1:, None])[asked - 1 :]
        scores.append(float(told.sum()))
    return scores.index(max(scores))


@pytest.mark.slow
def test_a_local_task_is_scored_as_plain_transformers_answers_it(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out = tmp_path / "results.json"
    local = ["--include", str(TASKS), "--device", "cpu"]
    arguments = ["evaluate", str(folder), "--tasks", "kmebench_capitals", *local]
    assert main([*arguments, "--out", str(out)]) == 0
    documents = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
    right = [chosen(folder, document) == document["answer"] for document in documents]
    assert sum(right) > 0  # it has learnt most of these capitals
    accuracy = json.loads(out.read_text())["results"]["kmebench_capitals"]["acc,none"]
    assert accuracy == pytest.approx(sum(right) / len(right))
    shown = capsys.readouterr()
    assert "it/s" not in shown.err  # no bars in a pipe
    row = next(line.split() for line in shown.out.splitlines() if " acc " in line)
    assert row[:3] == ["kmebench_capitals", "acc", f"{accuracy:.4f}"]
    assert row[-1] == str(len(documents))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("kmebench_capital", "did you mean 'kmebench_capitals'?"),
        ("%%%", "“lm-eval ls tasks” lists them"),
    ],
)
def test_an_unknown_task_is_told_before_the_model_is_loaded(task, complaint, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        harness.harness(tmp_path / "none", [task], include=TASKS)


@pytest.mark.slow
def test_what_the_harness_cannot_load_is_a_sentence(folder, tmp_path):
    pytest.importorskip("lm_eval")
    text = (TASKS / "capitals.yaml").read_text().replace("capitals.jsonl", "none.jsonl")
    (tmp_path / "none.yaml").write_text(text.replace("kmebench_capitals", "kmebench_none"))
    with pytest.raises(ConfigError, match="kmebench_none cannot be evaluated") as caught:
        harness.harness(folder, ["kmebench_none"], include=tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_notebook_edits_evaluates_and_plots(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    papermill = pytest.importorskip("papermill")
    path = ["workflow", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(p).resolve()) for p in path if p))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    told = {"model": str(folder), "methods": {"full-c": {"steps": 5}}, "facts": 6, "device": "cpu"}
    told |= {"relations": ["capital", "continent"]}
    executed = papermill.execute_notebook(
        NOTEBOOK, None, told, kernel_name="python3", progress_bar=False
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    tables = "".join(str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "full-c" in tables
    assert "openfacts_capital" in tables
