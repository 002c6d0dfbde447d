"""One cell of the grid: which requests are edited, and in which order."""

import subprocess
from pathlib import Path

import pytest
import torch

from kmebench.editors.base import Editor
from kmebench.edits.weights import WeightDelta
from kmebench.evaluation.frames import write_original
from kmebench.evaluation.predict import Settings
from kmebench.io.parts import Parts
from kmebench.pipelines import run
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup
from kmebench.pipelines.run import in_order, run_cell, run_pipeline
from tests.pipelines.runs import Counting

EVALUATION = Settings(batch_size=8, wild_max_tokens=2)


class Listing(Editor):
    """Changes nothing and notes what it was asked."""

    def __init__(self):
        super().__init__(None, {})
        self.asked = []

    def edit(self, model, requests):
        self.asked += [r.case_id for r in requests]
        return WeightDelta({})


def asked(mode, seed, make_model, requests, folder):
    editor = Listing()
    checkpoints = Checkpoints(folder, 100, {})
    setup = Setup(make_model("gptj", torch.float32), editor, EVALUATION, checkpoints)
    run_pipeline(
        setup, requests, {"mode": mode, "seed": seed, "batch_size": 10, "milestone_sample": None}
    )
    return editor.asked


def test_seed_zero_keeps_the_order_of_the_data_set_and_others_shuffle_it(requests):
    assert in_order(requests, 0) == list(requests)
    shuffled = in_order(list(requests) * 3, 1)
    assert shuffled == in_order(list(requests) * 3, 1)
    assert shuffled != list(requests) * 3
    assert sorted(r.case_id for r in shuffled) == sorted(r.case_id for r in list(requests) * 3)


@pytest.mark.parametrize(("mode", "shuffles"), [("consecutive", True), ("batch", False)])
def test_only_consecutive_edits_are_shuffled(mode, shuffles, make_model, requests, tmp_path):
    kept = [r.case_id for r in requests]
    orders = [asked(mode, seed, make_model, requests, tmp_path) for seed in range(4)]
    assert orders[0] == kept
    assert any(order != kept for order in orders[1:]) == shuffles


def test_the_commit_is_that_of_this_code_wherever_a_run_is_started(tmp_path, monkeypatch):
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    monkeypatch.chdir(tmp_path)
    assert (run.git_commit() or "").removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))  # a node without git
    assert run.git_commit() is None


CELL = {
    **{"mode": "consecutive", "editor": "none", "hparams": {"micro_batch": 20}, "seed": 0},
    **{"batch_size": 2, "checkpoint_every": 1, "milestone_sample": None},
    **{"on_failed_edit": "error", "on_bad_record": "error"},
    "evaluation": {"batch_size": 8, "wild_max_tokens": 2},
}


def test_only_a_setting_that_decides_the_bytes_begins_a_run_anew(
    make_model, requests, tmp_path, monkeypatch, caplog
):
    model = make_model("gptj", torch.float32)
    write_original(Parts(tmp_path / "original", {}), model, requests, EVALUATION)
    names = ("predictions", "timing", "run", "delta", "health", "norms")
    code = tmp_path / "code.py"
    code.touch()

    def made(stop_after, **changed):
        """Run with other settings until an edit does not return; return how many did."""
        editor = Counting(fail_at=stop_after)
        whole, asked = editor.edit, []
        editor.edit = lambda model, some: (asked.append(some), whole(model, some))[1]
        monkeypatch.setattr(run, "build_editor", lambda *_: editor)
        with pytest.raises(KeyboardInterrupt):
            run_cell(
                lambda: make_model("gptj", torch.float32),
                requests,
                CELL | changed,
                assets={},
                original=str(tmp_path / "original"),
                inputs={"code": [str(code)]},
                output={name: str(tmp_path / "run" / name) for name in names},
            )
        return len(asked) - 1

    assert made(1) == 1
    assert made(2, on_failed_edit="skip", on_bad_record="skip", checkpoint_every=2) == 1
    assert made(1, evaluation={"batch_size": 4, "wild_max_tokens": 2}) == 1
    assert "(settings.evaluation.batch_size differ)" in caplog.text
    code.write_text("changed")
    assert made(1) == 1
    assert "(inputs.code differ)" in caplog.text
    code.write_text("")
    assert made(2) == 0
