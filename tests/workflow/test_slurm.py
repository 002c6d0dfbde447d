"""The workflow on a real SLURM, where there is one (.ci/slurm starts one)."""

import re
import shutil
import subprocess
import time

import pandas as pd
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
        reason="no SLURM answers on this machine",
    ),
]
RUN = "results/runs/tiny-gptj/openfacts-zsre/consecutive/pac/default/seed0"
#: A cluster of one node without accounting, asked more often than one would ask a busy one.
ON_SLURM = (
    "--workflow-profile",
    "profiles/slurm",
    "--slurm-no-account",
    "--slurm-status-command",
    "squeue",
    "--slurm-init-seconds-before-status-checks",
    "5",
)


def submitted(output):
    return output.count("has been submitted with SLURM jobid")


def test_runs_come_out_of_the_cluster_as_they_do_here(copy_of_finished):
    folder = copy_of_finished.folder
    predictions, table = folder / RUN / "predictions.parquet", folder / "results/tables/table2.csv"
    here, numbers = predictions.read_bytes(), pd.read_csv(table)
    for path in (predictions, folder / "results/metrics/table2.parquet", table):
        path.unlink()
    output = copy_of_finished.run("results/tables/table2.csv", *ON_SLURM)
    assert submitted(output) == 2  # the run and its scores; the table is written on the spot
    assert predictions.read_bytes() == here
    pd.testing.assert_frame_equal(
        *(t.drop(columns="seconds_per_edit") for t in (pd.read_csv(table), numbers))
    )


def test_a_cancelled_run_saves_and_its_retry_ends_with_the_same_bytes(copy_of_finished):
    checkout, folder = copy_of_finished, copy_of_finished.folder / RUN
    slow = checkout.overlay("slow", methods={"pac": {"hparams": {"steps": 150, "tolerance": 0.0}}})
    configs, target = ("config/ci.yaml", slow), f"{RUN}/predictions.parquet"
    names = ("predictions.parquet", "delta.safetensors")
    checkout.run(target, configs=configs)
    undisturbed = {name: (folder / name).read_bytes() for name in names}
    shutil.rmtree(folder)

    said = checkout.folder / "said.txt"
    with said.open("w") as stream:
        job = subprocess.Popen(
            checkout.command(target, *ON_SLURM, configs=configs),
            cwd=checkout.folder,
            env=checkout.environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 300
        while not (folder / "checkpoints/1").is_dir():
            assert job.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        number = re.search(r"submitted with SLURM jobid (\d+)", said.read_text())[1]
        subprocess.run(["scancel", number], check=True)
        job.wait(timeout=300)
    output = said.read_text()
    assert job.returncode == 0, output
    assert submitted(output) == 2
    assert "Stopped by SIGTERM after " in output
    log = checkout.folder / "logs/edit/tiny-gptj.openfacts-zsre.consecutive.pac.default.seed0.log"
    assert "resumed after " in log.read_text(encoding="utf-8")
    assert {name: (folder / name).read_bytes() for name in names} == undisturbed
