"""What goes wrong on real machines: killed jobs, damaged caches, two commands in one folder."""

import os
import random
import signal
import subprocess
import time

import pytest

from tests.workflow.conftest import Checkout, wait_for

RUNS = "results/runs/tiny-gptj/openfacts-zsre"
RUN = f"{RUNS}/consecutive/pac/default/seed0"

#: Every script kills itself at the worst of moments, once: when a result is complete and about to
#: get its name. The consecutive run does so for each of its files, the others for their first and
#: for the first of its parts (training, which takes long, when it reads the facts).
KILLER = """
import os, re, signal, sys
from pathlib import Path

def watch(event, arguments):
    if event not in ("os.rename", "open") or ".snakemake/scripts/" not in sys.argv[0]:
        return
    stage = sys.argv[0].split(".")[-2]
    target = str(arguments[event == "os.rename"])
    if (event == "open") != (stage == "train_model"):
        return
    if stage == "edit":
        stage = next(m for m in ("batch", "consecutive", "breadth_first") if f"/{m}/" in target)
    what = re.sub(r"\\d+", "N", Path(target).name) if stage == "consecutive" else "first"
    if re.search(r"/[^./][^/]*\\.partial/", target):
        what = "part"
    mark = Path(os.environ["KILLED"]) / f"{stage} {what}"
    if what == "part" and target.endswith("identity.json"):
        return
    if ("results/" in target or "openfacts/" in target) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
"""

ABLATIONS = [f"ablation-{a}" for a in ("paths", "lambda", "negatives", "score", "selection")]

#: One job of nearly every rule.
SMALL = {
    "experiments": {
        "table1": {"methods": ["memit"], "datasets": ["openfacts-zsre"]},
        "table2": {"methods": ["pac"], "datasets": ["openfacts-zsre"]},
        "breadth-first": {"methods": ["pac-released"], "datasets": ["openfacts-zsre"]},
        **dict.fromkeys(ABLATIONS),
        "edit-order": None,
    },
    "tables": dict.fromkeys((*ABLATIONS, "edit-order", "breadth-first")),
    "figures": dict.fromkeys(
        (
            *("figure3-time", "figure5-paths", "figure6-lambda", "negatives", "path-scores"),
            *("edits", "weight-norms", "overview", "cost-quality", "path-layers"),
        )
    ),
    "notebooks": ["02_one_edit_under_the_microscope", "03_paper_tables"],
}

KILLED = {
    *("batch first", "breadth_first first"),
    # Checkpoints, whose record is written last, and the six results of the run.
    *("consecutive N", "consecutive record.json"),
    *(f"consecutive {name}" for name in ("timing.json", "run.json", "delta.safetensors")),
    *(f"consecutive {name}" for name in ("health.json", "norms.parquet", "predictions.parquet")),
    *(
        f"{stage} first"
        for stage in (
            *("fetch_dataset", "prepare_dataset", "train_model", "predict_original"),
            *("cache_gradients", "select_paths", "covariance", "factorise_covariance"),
            *("optimise_targets", "neutral_text"),
            *("score", "table", "costs", "findings", "node_importance", "figure", "index"),
            *("notebook",),
        )
    ),
    *(f"{stage} part" for stage in ("predict_original", "cache_gradients", "optimise_targets")),
}


#: Nobody may write to a folder of this name, not even root.
CLOSED = """
import os

allowed = os.access
os.access = lambda path, *mode, **more: "closed" not in str(path) and allowed(path, *mode, **more)
"""


@pytest.mark.integration
def test_results_that_cannot_be_written_end_a_run_in_a_sentence_before_any_job(tmp_path):
    checkout = Checkout(tmp_path)
    for name in ("closed", "site"):
        (tmp_path / name).mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CLOSED)
    configs = ("config/ci.yaml", checkout.overlay("mine", pathvars={"results": "closed/results"}))
    done = subprocess.run(
        checkout.command("--until", "fetch_dataset", configs=configs),
        cwd=tmp_path,
        env=checkout.environment(PYTHONPATH=str(tmp_path / "site")),
        capture_output=True,
        text=True,
    )
    assert done.returncode
    complaint = (
        f"pathvars.results cannot be 'closed/results': you may not write to {tmp_path}/closed"
    )
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.slow  # about twenty attempts, each with a start of Python and torch
def test_every_stage_is_killed_and_goes_on(finished, tmp_path):
    """Each kill costs one attempt; what was finished before it is not made again."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    (tmp_path / "killed").mkdir()
    (tmp_path / "checkout").mkdir()
    checkout = Checkout(tmp_path / "checkout")
    configs = ("config/ci.yaml", checkout.overlay("small", **SMALL))
    killing = {"PYTHONPATH": str(tmp_path / "site"), "KILLED": str(tmp_path / "killed")}
    # A download is tried again by itself, not by Snakemake.
    raw = "results/data/raw/openfacts-zsre.json"
    assert "SIGKILL" in checkout.run(raw, configs=configs, check=False, **killing)
    assert not (checkout.folder / raw).exists()
    checkout.run("--retries", "8", configs=configs, **killing)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == KILLED
    for run in (RUN, f"{RUNS}/batch/memit/default/seed0"):
        name = f"{run}/predictions.parquet"
        assert (checkout.folder / name).read_bytes() == (finished.folder / name).read_bytes()
    log = checkout.folder / "logs/edit/tiny-gptj.openfacts-zsre.consecutive.pac.default.seed0.log"
    assert "resumed after 4 edits" in log.read_text()
    for log in checkout.folder.glob("logs/predict_original/*.log"):
        assert "resumed behind 1 of 1 parts" in log.read_text()
    partial = ("results/**/.*.partial", "results/**/*.partial")
    assert [path for pattern in partial for path in checkout.folder.glob(pattern)] == []
    assert "Nothing to be done" in checkout.run(configs=configs)


#: A run as long as 200 edits, with milestones, of an editor that is quick.
LONG = {
    "evaluation": {"wild_max_tokens": 1},
    "checkpoint_every": 20,
    "milestone_sample": 30,
    "methods": {"pac": {"hparams": {"steps": 2}}},
    "datasets": {"openfacts-zsre": {"n": 200, "development": 10}},
}


@pytest.mark.slow
def test_two_hundred_edits_killed_at_random_places_give_the_same_bytes(copy_of_finished):
    """All processes are told to end (TERM), as at a shutdown, or die at once (KILL)."""
    checkout, places = copy_of_finished, random.Random(0)
    configs = ("config/ci.yaml", checkout.overlay("long", **LONG))
    folder, target = checkout.folder / RUN, f"{RUN}/predictions.parquet"
    checkout.run(target, configs=configs)
    names = ("predictions.parquet", "delta.safetensors", "health.json")
    straight = {name: (folder / name).read_bytes() for name in names}
    for path in folder.iterdir():
        path.unlink()
    for reached, how in ((20, signal.SIGTERM), (80, signal.SIGKILL), (140, signal.SIGKILL)):
        _end_after(checkout, [target], configs, reached, how, places.uniform(0, 1))
        assert not (folder / "predictions.parquet").exists()
    checkout.run("--unlock", configs=configs)
    checkout.run(target, configs=configs)
    assert {name: (folder / name).read_bytes() for name in names} == straight
    assert not (folder / "checkpoints").exists()


def _end_after(checkout, targets, configs, reached, how, seconds):
    """Start the workflow, and end it some seconds after a checkpoint of ``reached`` edits."""
    checkout.run("--unlock", configs=configs)
    job = checkout.start(*targets, configs=configs)
    kept = checkout.folder / RUN / "checkpoints"
    wait_for(job, lambda: any(int(p.name) >= reached for p in kept.glob("[0-9]*")))
    time.sleep(seconds)
    assert job.poll() is None, "it ended before it was to be killed"
    os.killpg(job.pid, how)
    job.wait()


FULL_C = "results/runs/tiny-gptj/openfacts-counterfact/batch/full-c/default/seed0"
EPOCHS = "runs/tiny-gptj/openfacts-zsre/breadth_first/pac-released/default/seed0"
PATHS = "results/trace/tiny-gptj/openfacts-zsre/paths/l2+edit+disjoint+paths=15+negatives=1"


@pytest.mark.parametrize(
    "damaged",
    [
        # A file -> what is missing and reads it. None of these is read on the way to another.
        {
            "trace/tiny-gptj/openfacts-zsre/gradients.safetensors": f"{PATHS}.safetensors",
            "covariance/tiny-gptj/inverse/1.safetensors": f"{RUN.replace('pac', 'rome')}/run.json",
            "original/tiny-gptj/openfacts-counterfact.parquet": f"{FULL_C}/run.json",
            f"{EPOCHS}/timing.json": "results/metrics/breadth-first.parquet",
        },
        {"data/openfacts-zsre.jsonl": f"{RUN}/predictions.parquet"},
    ],
    ids=["stages", "data"],
)
def test_a_damaged_file_is_set_aside_and_made_again(damaged, copy_of_finished):
    """What is made again is the same to the byte, unless it holds times."""
    folder = copy_of_finished.folder
    targets = list(damaged.values())
    before = {name: (folder / "results" / name).read_bytes() for name in damaged}
    answers = (folder / RUN / "predictions.parquet").read_bytes()
    for name, target in damaged.items():
        path = folder / "results" / name
        stamp = path.stat()
        path.write_bytes(before[name][: len(before[name]) // 2])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # unseen by Snakemake
        (folder / target).unlink()
    output = copy_of_finished.run("--keep-going", *targets, check=False)
    assert "Traceback" not in output
    for name, whole in before.items():
        assert f"results/{name} is damaged" in output
        aside = folder / "results" / f"{name}.damaged"
        assert aside.read_bytes() == whole[: len(whole) // 2]
    assert output.count("run the same command again, which makes it anew") >= len(damaged)
    copy_of_finished.run(*targets)
    assert all((folder / target).exists() for target in targets)
    for name, whole in before.items():
        path = folder / "results" / name
        holds_times = name.endswith(("gradients.safetensors", "timing.json"))
        assert path.exists() if holds_times else path.read_bytes() == whole
    assert (folder / RUN / "predictions.parquet").read_bytes() == answers
