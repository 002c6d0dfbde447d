"""What goes wrong on real machines: killed jobs, damaged caches, two commands in one folder."""

import os
import signal
import subprocess
import time

import pytest

from tests.workflow.conftest import Checkout

RUNS = "results/runs/tiny-gptj/openfacts-zsre"
RUN = f"{RUNS}/consecutive/pac/default/seed0"

#: Every script kills itself at the worst of moments, once: when a result is complete and about to
#: get its name. The consecutive run does so for each of its files, the others for their first
#: (training, which takes long, when it reads the facts).
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
    mark = Path(os.environ["KILLED"]) / f"{stage} {what}"
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
    # Checkpoints, whose record is written last, and the five results of the run.
    *("consecutive N", "consecutive record.json"),
    *(f"consecutive {name}" for name in ("timing.json", "run.json", "delta.safetensors")),
    *(f"consecutive {name}" for name in ("health.json", "predictions.parquet")),
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
}


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
    checkout.run("--retries", "7", configs=configs, **killing)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == KILLED
    for run in (RUN, f"{RUNS}/batch/memit/default/seed0"):
        name = f"{run}/predictions.parquet"
        assert (checkout.folder / name).read_bytes() == (finished.folder / name).read_bytes()
    log = checkout.folder / "logs/edit/tiny-gptj.openfacts-zsre.consecutive.pac.default.seed0.log"
    assert "resumed after 4 edits" in log.read_text()
    assert list(checkout.folder.glob("results/**/.*.partial")) == []
    assert "Nothing to be done" in checkout.run(configs=configs)


PATHS = "results/trace/tiny-gptj/openfacts-zsre/paths/l2+edit+disjoint+paths=15+negatives=1"


@pytest.mark.parametrize(
    ("damaged", "target", "holds_times"),
    [
        ("trace/tiny-gptj/openfacts-zsre/gradients.safetensors", f"{PATHS}.safetensors", True),
        (
            "covariance/tiny-gptj/inverse/1.safetensors",
            f"{RUN.replace('pac', 'rome')}/timing.json",
            False,
        ),
        ("original/tiny-gptj/openfacts-zsre.parquet", f"{RUN}/timing.json", False),
        ("data/openfacts-zsre.jsonl", f"{RUN}/timing.json", False),
        (f"{RUN.removeprefix('results/')}/timing.json", "results/metrics/table2.parquet", True),
    ],
)
def test_a_damaged_file_is_set_aside_and_made_again(damaged, target, holds_times, copy_of_finished):
    folder = copy_of_finished.folder
    path = folder / "results" / damaged
    whole, stamp = path.read_bytes(), path.stat()
    path.write_bytes(whole[: len(whole) // 2])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # unseen by Snakemake
    (folder / target).unlink()
    output = copy_of_finished.run(target, check=False)
    assert f"results/{damaged} is damaged" in output
    assert "run the same command again, which makes it anew" in output
    assert "Traceback" not in output
    assert path.with_name(f"{path.name}.damaged").read_bytes() == whole[: len(whole) // 2]
    copy_of_finished.run(target)
    assert (folder / target).exists()
    assert path.exists() if holds_times else path.read_bytes() == whole


def test_a_second_command_in_the_same_folder_is_refused(copy_of_finished):
    (copy_of_finished.folder / f"{RUN}/predictions.parquet").unlink()
    first = subprocess.Popen(
        copy_of_finished.command(f"{RUN}/predictions.parquet"),
        cwd=copy_of_finished.folder,
        env=copy_of_finished.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    locks = copy_of_finished.folder / ".snakemake/locks"
    deadline = time.monotonic() + 60
    while not any(locks.glob("*")):
        assert first.poll() is None, "the first command ended before the second could begin"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second has begun
    output = copy_of_finished.run(f"{RUN}/timing.json", "--forcerun", "edit", check=False)
    first.send_signal(signal.SIGCONT)
    assert "cannot be locked" in output
    assert first.wait(timeout=120) == 0
    assert (copy_of_finished.folder / f"{RUN}/predictions.parquet").exists()
