"""The workflow end to end on config/ci.yaml: what runs, what does not run again, and why."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from kmebench.data.records import read_requests
from kmebench.devices import uses_gpu
from kmebench.edits.edit import Edit
from tests.workflow.conftest import Checkout, copied, count, wait_for

RUN = "results/runs/tiny-gptj/openfacts-zsre/consecutive/pac/default/seed0"


def test_all_tables_are_there_and_printed(finished):
    for table in ("table1", "table2", "breadth-first"):
        for kind in ("csv", "md", "tex"):
            assert (finished.folder / f"results/tables/{table}.{kind}").stat().st_size
    table = pd.read_csv(finished.folder / "results/tables/table2.csv")
    editors = ["lora", "original", "pac", "prune", "rome"]
    assert table.groupby("editor").size().to_dict() == dict.fromkeys(editors, 2)
    assert table["n"].unique().tolist() == [4]
    assert table.loc[table["editor"] != "original", "score"].between(0, 100).all()


def test_the_tiny_model_knows_its_facts(finished):
    log = (finished.folder / "logs/train_model/tiny-gptj.log").read_text()
    (share,) = re.findall(r"answers ([\d.]+)% of", log)
    assert float(share) >= 95
    original = pd.read_parquet(
        finished.folder / "results/original/tiny-gptj/openfacts-counterfact.parquet"
    )
    asked = original[original["kind"] == "edit"]
    assert (asked["target_true_logprob"] > asked["target_new_logprob"]).mean() >= 0.75


def test_a_finished_workflow_does_nothing_within_ten_seconds(finished):
    start = time.monotonic()
    assert "Nothing to be done" in finished.run()
    assert time.monotonic() - start < 10


def edit(checkout, path):
    file = checkout.folder / "workflow" / "kmebench" / path
    file.write_text(file.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")


def test_what_decides_no_result_runs_nothing_again(copy_of_finished):
    """Files that are only touched or are changed back, and code that no number depends on."""
    for path in copy_of_finished.folder.rglob("*"):
        if path.suffix in (".py", ".smk", ".yaml", ".csv", ".json") and (
            "results" not in path.relative_to(copy_of_finished.folder).parts
        ):
            path.touch()
    (copy_of_finished.folder / "Snakefile").touch()
    file = copy_of_finished.folder / "workflow/kmebench/editors/pac/pac.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text + "\n", encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    for changed in (
        *("errors.py", "names.py", "forkserver.py", "io/logs.py"),
        *("editors/cards.py", "editors/pac/cards.py"),
    ):
        edit(copy_of_finished, changed)
    assert copy_of_finished.planned() == {}


#: Rules that run no editor, and look at what editors left.
REPORTING = {"score", "table", "costs", "findings", "figure", "index", "node_importance"}
REPORTING |= {"notebook", "model_notebook"}


def apart(planned):
    """Split a plan: the jobs of rules that make what is reported, and the rules that report it."""
    made = {rule: count for rule, count in planned.items() if rule not in REPORTING}
    return made, set(planned) - set(made)


#: What makes results: a changed file -> the jobs that make something again because of it.
MAKES = {
    # Full-C runs: 2 data sets in batches, one breadth first.
    "editors/finetune/full_c.py": {"edit": 3},
    # MEMIT and PMET in batches, PRUNE consecutively.
    "editors/locate/memit.py": {"edit": 6},
    # ROME optimises its own targets.
    "editors/locate/targets.py": {"optimise_targets": 4, "edit": 8},
    "editors/locate/covariance/texts.py": {"covariance": 1, "factorise_covariance": 2, "edit": 8},
    # PAC: two more consecutive runs in the ablations.
    "editors/pac/pac.py": {"edit": 6},
    "editors/pac/released.py": {"edit": 1},
}
#: What reports them: a changed file -> rules that run because of it.
REPORTS = {
    "reporting/tables.py": {"table", "costs", "findings", "index"},
    "reporting/figures.py": {"figure", "index"},
    "reporting/templates/page.html.j2": {"table", "costs", "findings", "index"},
    "evaluation/protocols.py": {"score", "table", "findings", "figure", "index"},
}
#: A changed file -> the notebooks that are executed again because of it.
NOTEBOOKS = {
    "editors/pac/pac.py": {"02", "03", "04", "05", "06"},
    "editors/finetune/lora.py": {"03", "05", "06"},
    "data/records.py": {"01", "02", "03", "04", "05", "06"},
    "reporting/comparisons.py": {"05"},
    "pipelines/one_fact.py": {"02"},
}


@pytest.fixture(scope="module")
def because_of(finished, tmp_path_factory):
    """The jobs that one change alone would run, out of one dry run in which all are made.

    They are those that read the changed file, or what such a job makes.
    """
    checkout = copied(finished.folder, tmp_path_factory.mktemp("changed"))
    for changed in {*MAKES, *REPORTS, *NOTEBOOKS}:
        edit(checkout, changed)
    planned = checkout.jobs()

    def jobs(changed):
        files, found = {f"workflow/kmebench/{changed}"}, []
        for job in planned:
            if not files.isdisjoint(job.input):
                files |= set(job.output)
                found.append(job)
        return found

    return jobs


@pytest.mark.parametrize("changed", MAKES)
def test_changing_an_editor_runs_its_own_runs_and_what_reports_them(changed, because_of):
    made, reporting = apart(count(because_of(changed)))
    assert made == MAKES[changed]
    assert {"score", "table", "index"} <= reporting


@pytest.mark.parametrize("changed", REPORTS)
def test_changing_what_reports_runs_no_editor(changed, because_of):
    made, reporting = apart(count(because_of(changed)))
    assert made == {}
    assert REPORTS[changed] <= reporting


@pytest.mark.parametrize("changed", NOTEBOOKS)
def test_a_change_executes_the_notebooks_that_it_can_influence(changed, because_of):
    files = {file for job in because_of(changed) for file in job.output}
    pages = {Path(file).name for file in files if file.startswith("results/notebooks/")}
    assert {page[:2] for page in pages} == NOTEBOOKS[changed]


@pytest.mark.integration
def test_a_job_on_a_cluster_asks_for_a_gpu_that_this_machine_may_lack(tmp_path):
    checkout, slurm = Checkout(tmp_path), ("--workflow-profile", "profiles/slurm")
    target = "results/original/tiny-gptj/neutral.safetensors"

    def gpus(*arguments, **overlay):
        configs = ("config/ci.yaml", checkout.overlay("device", **overlay))
        jobs = checkout.jobs(target, *arguments, configs=configs)
        return {job.rule_name: job.gpu for job in jobs}

    assert gpus(*slurm) == {"train_model": None, "neutral_text": 1}
    assert gpus(*slurm, device="cpu")["neutral_text"] == 0
    assert gpus()["neutral_text"] == int(uses_gpu("auto"))


def test_a_changed_default_runs_its_own_editors_runs_again(copy_of_finished):
    for family, old, new in (
        ("pac", "] = 2\n    rescore_every", "] = 3\n    rescore_every"),  # of pac-released alone
        # Of PMET alone, which overrides MEMIT's.
        ("locate", "clamp_factor: Clamp = 1.0", "clamp_factor: Clamp = 2.0"),
    ):
        file = copy_of_finished.folder / f"workflow/kmebench/editors/{family}/cards.py"
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    jobs = copy_of_finished.jobs()
    made, reporting = apart(count(jobs))
    assert made == {"edit": 3, "optimise_targets": 2}
    edits = [job.output[0].split("/") for job in jobs if job.rule_name == "edit"]
    assert sorted(parts[5] for parts in edits) == ["pac-released", "pmet", "pmet"]
    assert {"score", "table", "index"} <= reporting


@pytest.mark.parametrize(
    ("hparams", "expected"),
    [
        # The default runs, those of the ablations, and lambda=0.1, which was the default before.
        ({"lambda": 0.2}, {"edit": 7}),
        # The default runs, the ablation of scores, and paths=15, which was the default before.
        ({"paths": 7}, {"edit": 6, "select_paths": 2}),
    ],
)
def test_other_paths_or_lambda_reuse_the_gradient_cache(hparams, expected, finished):
    overlay = finished.overlay("other", methods={"pac": {"hparams": hparams}})
    planned = finished.planned(configs=("config/ci.yaml", overlay))
    assert apart(planned)[0] == expected


def test_longer_answers_trace_nothing_again(finished):
    """How long answers may be concerns predictions, and what is left out of a data set."""
    overlay = finished.overlay("longer", evaluation={"wild_max_tokens": 9})
    planned = finished.planned(configs=("config/ci.yaml", overlay))
    assert {"predict_original", "edit"} <= planned.keys()
    assert not {"cache_gradients", "select_paths", "optimise_targets"} & planned.keys()


def test_another_point_of_a_sweep_runs_that_point_alone(finished):
    sweep = {"ablation-paths": {"sweep": {"paths": [5, 15, 20]}}}
    overlay = finished.overlay("point", experiments=sweep)
    planned = finished.planned(configs=("config/ci.yaml", overlay))
    assert apart(planned)[0] == {"edit": 1, "select_paths": 1}


def test_tuning_takes_the_development_split(finished):
    tuning = finished.overlay(
        "tuning",
        experiments={
            "tune": {
                "mode": "consecutive",
                "tunes": "mode",
                "models": ["tiny-gptj"],
                "datasets": ["openfacts-zsre.development"],
                "methods": ["pac"],
                "sweep": {"learning_rate": [0.001, 0.002]},
            }
        },
        tables={"tune": {"title": "Tuning", "experiment": "tune", "protocol": "token"}},
        datasets={"openfacts-zsre": {"development": 10}},
    )
    chosen = "results/tuning/tune.yaml"
    finished.run("results/tables/tune.md", chosen, configs=("config/ci.yaml", tuning))
    section = yaml.safe_load((finished.folder / chosen).read_text())["models"]["tiny-gptj"]
    assert section["hparams"]["pac"]["consecutive"]["learning_rate"] in (0.001, 0.002)
    table = pd.read_csv(finished.folder / "results/tables/tune.csv")
    assert table["variant"].tolist() == [
        "default",  # the original model
        "learning_rate=0.001",
        "learning_rate=0.002",
    ]
    assert table["n"].unique().tolist() == [10]
    split = finished.folder / "results/data/openfacts-zsre.development.jsonl"
    run = RUN.replace("zsre", "zsre.development").replace("default", "learning_rate=0.002")
    edited = pd.read_parquet(finished.folder / run / "predictions.parquet")
    held_out = {json.loads(line)["case_id"] for line in split.read_text().splitlines()}
    assert set(edited["case_id"]) == held_out


def test_a_run_shared_by_two_experiments_is_computed_once(finished):
    """The ablation's paths=15 is the default run of table 2."""
    folder = finished.folder / RUN
    variants = {path.name for path in folder.parents[1].iterdir()}
    assert variants == {"default", "paths=5", "trace_on=current"}


TORCHLESS = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
"""


def test_tables_are_rebuilt_without_torch(copy_of_finished, tmp_path):
    """A table, its metrics and a figure; `make tables` in the gate makes all of them."""
    table, *others = (
        copy_of_finished.folder / "results" / name
        for name in ("tables/table2.csv", "metrics/table2.parquet", "figures/edits.csv")
    )
    before = table.read_bytes()
    for path in (table, *others):
        path.unlink()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TORCHLESS)
    path = str(tmp_path / "site")
    probe = subprocess.run(
        [os.sys.executable, "-c", "import torch"],
        env=copy_of_finished.environment(PYTHONPATH=path),
        capture_output=True,
        check=False,
    )
    assert probe.returncode != 0  # the block works
    subprocess.run(
        copy_of_finished.command(*("results/tables/table2.csv", "results/figures/edits.csv")),
        cwd=copy_of_finished.folder,
        env=copy_of_finished.environment(PYTHONPATH=path),
        check=True,
    )
    assert table.read_bytes() == before
    assert all(path.is_file() for path in others)


def test_a_second_command_is_refused_and_a_killed_run_resumes_with_the_same_bytes(copy_of_finished):
    folder = copy_of_finished.folder / RUN
    names = ("predictions.parquet", "delta.safetensors")
    before = {name: (folder / name).read_bytes() for name in names}
    for path in folder.iterdir():
        path.unlink()
    target = f"{RUN}/predictions.parquet"
    job = copy_of_finished.start(target)
    locks = copy_of_finished.folder / ".snakemake/locks"  # of the inputs first, then the outputs
    wait_for(job, lambda: any(target in path.read_text() for path in locks.glob("*.output.lock")))
    job.send_signal(signal.SIGSTOP)  # so that no edit begins before the second command has ended
    output = copy_of_finished.run(f"{RUN}/timing.json", "--forcerun", "edit", check=False)
    assert "cannot be locked" in output
    job.send_signal(signal.SIGCONT)
    wait_for(job, lambda: any((folder / "checkpoints" / str(n)).is_dir() for n in (1, 2, 3)))
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (folder / "predictions.parquet").exists()
    copy_of_finished.run("--unlock")
    # As a user does whose edit has failed: what was made before stays made.
    skipping = copy_of_finished.overlay("skipping", on_failed_edit="skip")
    copy_of_finished.run(target, configs=("config/ci.yaml", skipping))
    log = (
        copy_of_finished.folder
        / "logs/edit/tiny-gptj.openfacts-zsre.consecutive.pac.default.seed0.log"
    ).read_text()
    assert re.search(r"resumed after [1234] edits", log)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overlay", "complaint"),
    [
        ({"methods": {"pac": {"hparam": {}}}}, "methods.pac: there is no key 'hparam'"),
        ({"experiments": {"table1": {"methods": ["pax"]}}}, "did you mean 'pac'"),
    ],
)
def test_a_wrong_config_stops_before_any_job(overlay, complaint, finished):
    name = finished.overlay("wrong", **overlay)
    output = finished.run("--dry-run", configs=("config/ci.yaml", name), check=False)
    assert complaint in output
    assert "Traceback" not in output


def test_bad_data_end_in_one_sentence_and_leave_nothing(copy_of_finished):
    broken = copy_of_finished.folder / "broken"
    broken.mkdir()
    (broken / "set.json").write_text('[{"subject": "Ada", "src"')
    overlay = copy_of_finished.overlay(
        "data",
        datasets={
            "mine": {
                "source": {"source": "file", "filenames": ["set.json"]},
                "schema": "mend",
                "n": 1,
            }
        },
        experiments={"table1": {"datasets": ["mine"]}},
    )
    output = copy_of_finished.run(
        "results/data/mine.jsonl",
        configs=("config/ci.yaml", overlay),
        check=False,
        KMEBENCH_DATA_MIRROR=str(broken),
    )
    assert "broken/set.json is not valid JSON at line 1, column 26" in output
    assert not (copy_of_finished.folder / "results/data/mine.jsonl").exists()


def test_a_data_set_leaves_out_what_others_were_tuned_on(copy_of_finished):
    """The raw records are those of the data set that is left out in part."""
    own = {"source": "openfacts", "kind": "zsre", "seed": 0}
    spec = {"source": own, "schema": "mend", "n": 60}
    overlay = copy_of_finished.overlay(
        "long",
        datasets={
            "every": spec,
            "apart": spec | {"leave_out": ["openfacts-zsre.development"]},
        },
    )
    names = ("openfacts-zsre.development", "every", "apart")
    targets = [f"results/data/{name}.jsonl" for name in names]
    copy_of_finished.run(*targets, configs=("config/ci.yaml", overlay))
    held_out, every, apart = (
        {r.subject for r in read_requests(copy_of_finished.folder / target)} for target in targets
    )
    assert held_out & every
    assert not held_out & apart
    assert len(read_requests(copy_of_finished.folder / targets[2])) == 60


TOY = """
import torch

from kmebench.editors.base import Editor
from kmebench.editors.cards import Card, hyperparameters
from kmebench.errors import EditError
from kmebench.edits.weights import Columns, WeightDelta


@hyperparameters
class ToyHparams:
    size: float = 1.0


CARD = Card("toy", "toys:Toy", ToyHparams, "toys", "nobody")


class Toy(Editor):
    calls = 0

    def edit(self, model, requests):
        self.calls += 1
        if self.calls == 2:
            raise EditError("not this one")
        value = model.ffn[0].value
        change = torch.full((1, value.weight.shape[0]), self.hparams.size)
        return WeightDelta({value.weight_name: Columns(torch.tensor([3]), change)})
"""


def test_an_editor_of_ones_own_needs_a_class_a_card_and_three_lines_of_config(finished, tmp_path):
    (tmp_path / "toys.py").write_text(TOY)
    overlay = finished.overlay(
        "toy",
        methods={"toy": {"editor": "toys:CARD", "hparams": {"size": 0.5}}},
        experiments={"table2": {"methods": ["toy"], "datasets": ["openfacts-zsre"]}},
        on_failed_edit="skip",
    )
    configs = ("config/ci.yaml", overlay)
    run = RUN.replace("/pac/", "/toy/")
    finished.run(f"{run}/delta.safetensors", configs=configs, PYTHONPATH=str(tmp_path))
    (part,) = Edit.load(finished.folder / run / "delta.safetensors").weights.values()
    assert part.index.tolist() == [3]
    torch.testing.assert_close(part.values, torch.full_like(part.values, 3 * 0.5))
    timing = json.loads((finished.folder / run / "timing.json").read_text())
    assert timing["failed_edits"] == len(timing["failures"]) == 1
    stopped = finished.overlay("stopped", on_failed_edit="error", checkpoint_every=7)
    target = f"{run}/delta.safetensors"
    kept = finished.run("-n", target, configs=(*configs, stopped), PYTHONPATH=str(tmp_path))
    assert "Nothing to be done" in kept
    output = finished.run(
        target,
        "--forcerun",
        "edit",
        configs=(*configs, stopped),
        check=False,
        PYTHONPATH=str(tmp_path),
    )
    assert "not this one" in output
