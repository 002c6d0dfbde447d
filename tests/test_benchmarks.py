"""The benchmarks run: on a small random model, in seconds. Their figures mean nothing here."""

import importlib
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import GPTJConfig, LlamaConfig

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of

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
    for script in Path("benchmarks").glob("*.py"):
        sys.modules.pop(script.stem, None)


@pytest.mark.parametrize("family", SMALL)
def test_pac_step_prints_a_row_for_every_size(family, benchmark, capsys):
    benchmark("pac_step", "--architecture", family, "--sizes", "1", "3", "--steps", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["1", "3"]
    assert "PAC step (ms)" in lines[0]


def test_pac_edit_prints_a_row_for_every_editor_and_size(benchmark, capsys):
    benchmark("pac_edit", "--architecture", "gptj", "--sizes", "1", "2", "--steps", "2")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].strip() for line in table[2:]]
    editors = ["PAC", "PAC, learning rate 1e-3", "PAC, learning rate 2e-3"]
    editors += ["PAC, released schedule", "PAC, released schedule, dense", "Full-C"]
    assert named == [editor for editor in editors for _ in range(2)]


def test_editors_prints_a_row_for_every_configured_method(benchmark, capsys, tmp_path):
    config = yaml.safe_load(Path("config.yaml").read_text())
    for name, method in config["methods"].items():
        editor = build_editor(method.get("editor", name), {}, {})
        fields = vars(editor.hparams)
        few = {"steps": 2, "epochs": 1, "layer": 1, "clamp_factor": 1.0}
        hparams = {key: value for key, value in few.items() if key in fields}
        if card_of(editor.name).family == "locate" and "layers" in fields:
            hparams["layers"] = [1]
        if "value_layers" in fields:
            hparams |= {"value_layers": [0], "key_layers": []}
        if editor.name in ("npac", "crispedit"):
            hparams["layers"] = [0]  # for NPAC: no later token reads the last at the subject
        method["hparams"] = method.get("hparams", {}) | hparams
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    arguments = ("--architecture", "llama", "--sizes", "1", "2")
    benchmark("editors", *arguments, "--config", str(tmp_path / "config.yaml"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].strip() for line in table[2:]]
    assert named == [method for method in config["methods"] for _ in range(2)]


def test_shared_context_prints_what_a_question_costs(benchmark, capsys):
    benchmark("shared_context", "--architecture", "llama", "--blocks", "3")
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == ["none", "read once", "read with each question"]


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


# -- gpu.py ---------------------------------------------------------------------------

#: What a machine for models has, with small wheels (the docstring of gpu.py).
PLAIN = {"torch", "transformers", "pandas", "numpy", "safetensors", "huggingface_hub", "rich"}
PLAIN |= {"pygments", "peft", "accelerate", "pydantic"}
ALONE = """
import sys
for name in {lacking!r}:
    sys.modules[name] = None  # as if it were not installed
sys.path[:0] = ["benchmarks", "workflow"]
sys.argv = ["gpu.py", {folder!r}, "--shape", "tiny", "--device", "cpu"]
import gpu
gpu.main()
"""
EDIT = {"seconds", "seconds_per_edit", "steps", "seconds_of", "peak_over_weights_bytes"}
SUMMED = {"of", "step_seconds", "busy_share", "kernels", "kernel_seconds", "launches", "gaps"}


@pytest.fixture
def gpu(monkeypatch):
    """The modules gpu, gpu_parts, kernels and common."""
    monkeypatch.syspath_prepend("benchmarks")
    names = ("gpu", "gpu_parts", "kernels", "common")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for script in Path("benchmarks").glob("*.py"):
        sys.modules.pop(script.stem, None)


@pytest.fixture
def bench(gpu, tmp_path):
    def make(budget: float):
        return gpu.gpu_parts.Bench("tiny", torch.device("cpu"), budget, tmp_path)

    return make


def of_one_run(test):
    """All of gpu.py, from start to end: one process of pytest-xdist makes what all look at."""
    return pytest.mark.slow(pytest.mark.xdist_group("gpu")(test))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What gpu.py writes where only a plain machine's packages can be imported."""
    folder = tmp_path_factory.mktemp("gpu")
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    names = {d.partition(">")[0].partition("[")[0] for d in project["dependencies"]}
    script = ALONE.format(lacking=sorted(names - PLAIN), folder=str(folder))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}
    return written, run.stdout


@of_one_run
def test_gpu_measures_every_part_on_a_machine_without_our_dependencies(figures, gpu):
    written, printed = figures
    parts = [(part.file, part.name) for part in gpu.gpu.PARTS]
    assert sorted(parts) == sorted((file, name) for file, of in written.items() for name in of)
    lines = [line.partition(":")[0] for line in printed.splitlines()]
    assert [line for line in lines if line in {" ".join(part) for part in parts}] == [
        " ".join(part) for part in parts
    ]
    assert len(written) <= 8
    for file, name in parts:
        record = written[file][name]
        assert not {"error", "skipped", "stopped_after"} & set(record), (file, name, record)
        assert all(math.isfinite(number) and number >= 0 for number in numbers(record))


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@of_one_run
def test_gpu_figures_of_pac_are_those_that_were_asked_for(figures):
    written, _ = figures
    limits = written["machine"]["machine"]
    for model in ("llama3-8b", "llama2-7b", "gptj-6b"):
        file = written[f"{model}-pac"]
        for kind, requests in (("single", 1), ("batch", 3)):
            record = file[kind]
            assert record["requests"] == requests
            assert set(record["edit"]) >= EDIT
            assert record["edit"]["steps"] == limits["shape"]["steps"]
            assert set(record["edit"]["seconds_of"]) == {"trace", "optimise", "apply"}
            assert min(record["step_seconds"].values()) > 0
            share = record["step_limit_seconds"] / record["step_seconds"]["as_it_is"]
            assert record["step_share_of_limit"] == pytest.approx(share)
            profile = file["profile"][kind]
            assert set(profile) >= SUMMED
            assert 0 < profile["busy_share"] < 1
            assert profile["kernels"] > 1000
            assert profile["top"][0]["seconds"] >= profile["top"][-1]["seconds"] > 0
            assert file["yardstick"][kind]["gradient_of_all_weights_seconds"] > 0
        assert file["yardstick"]["large_batch"]["gradient_of_inputs_seconds"] > 0
        # The weights, read twice.
        least = 2 * file["single"]["read_weights_bytes"] / limits["read_bytes_per_second"]
        assert file["single"]["step_limit_seconds"] >= least


@of_one_run
def test_gpu_other_editors_take_all_their_steps(figures, gpu):
    written, _ = figures
    shape = written["machine"]["machine"]["shape"]
    for editor, record in written["llama3-8b-editors"].items():
        kinds = ["single"] + ["batch"] * (editor in gpu.gpu_parts.TOGETHER)
        assert [kind for kind in ("single", "batch") if kind in record] == kinds
        for kind in ["first_edit", *kinds]:
            # ROME's family makes as many passes, of which the last may move nothing.
            assert shape["editor_steps"] - 1 <= record[kind]["steps"] <= shape["editor_steps"]
    stretches = written["llama3-8b-consecutive"]["pac"]
    assert [key for key in stretches if key.startswith("edits")] == [
        "edits_1_to_2",
        "edits_3_to_4",
        "edits_5_to_6",
    ]


def test_gpu_leaves_out_what_there_is_no_time_for(gpu, bench, tmp_path, capsys):
    parts = [part._replace(run=lambda _: pytest.fail("it ran")) for part in gpu.gpu.PARTS]
    parts.insert(1, gpu.gpu.Part("quick", "quick", 0.0, lambda _: iter([{"figure": 1.0}])))
    assert gpu.gpu.run_parts(bench(5), parts, tmp_path / "out")
    written = json.loads((tmp_path / "out/machine.json").read_text())
    assert written == {"machine": {"skipped": "it takes about 10 s, and 5 s are left"}}
    assert json.loads((tmp_path / "out/quick.json").read_text())["quick"]["figure"] == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(parts)
    assert sum("skipped" in line for line in lines) == len(parts) - 1


def test_gpu_goes_on_after_a_part_that_fails_and_says_so(gpu, bench, tmp_path):
    def fails(_):
        yield {"before": 1}
        raise RuntimeError("no memory\nand more")

    parts = [
        gpu.gpu.Part("a", "fails", 0.0, fails),
        gpu.gpu.Part("a", "works", 0.0, lambda _: iter([{"figure": 2}])),
    ]
    assert not gpu.gpu.run_parts(bench(60), parts, tmp_path)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["fails"]["before"] == 1
    assert record["fails"]["error"] == "RuntimeError: no memory"
    assert record["works"]["figure"] == 2


def test_consecutive_edits_end_where_the_next_stretch_would_take_too_long(gpu, bench, monkeypatch):
    run = bench(3600)
    # Time enough for the first stretch, of which nothing is known, and for no second.
    monkeypatch.setattr(run, "left", lambda: 0.0)
    pieces = list(gpu.gpu_parts.consecutive(run, "llama3-8b"))
    assert "edits_1_to_2" in pieces[1]
    assert pieces[2:] == [{"stopped_after": 2}]


def test_every_token_of_a_filled_vocabulary_is_text_of_one_token(gpu):
    tokenizer = gpu.common.full_tokenizer(5000)
    assert len(tokenizer) == 5000
    said = [3100, 4999, 4000, 3001]
    assert tokenizer(tokenizer.decode(said))["input_ids"] == said


def test_the_limit_counts_reading_and_arithmetic(gpu, bench):
    run = bench(60)
    model = run.model("llama3-8b")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    requests = gpu.common.openfacts_requests(3)
    batch = gpu.gpu_parts.collated(model, requests)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    tokens = sum(len(e.ids) - 1 for e in encoded)
    assert gpu.gpu_parts.tokens_of(batch) == tokens
    run.read_speed, run.flop_speed = 1e3, 1e30
    size = model.model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.model.parameters()) - 2 * size
    limit = gpu.gpu_parts.limit_seconds
    assert limit(run, model, batch, reads=2, passes=3) == pytest.approx(4 * (body + size) / 1e3)
    run.read_speed, run.flop_speed = 1e30, 1e6
    answers = sum(e.n_target for e in encoded)
    flop = 6 * (body * tokens + size * answers)
    assert limit(run, model, batch, reads=2, passes=3) == pytest.approx(flop / 1e6)


def event(cat: str, name: str, ts: float, dur: float, **more) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1} | more


def test_summary_of_a_gpu_trace(gpu):
    events = [
        event("user_annotation", "ProfilerStep#2", 0, 100),
        event("gpu_user_annotation", "ProfilerStep#2", 0, 100),  # covers all and is no work
        event("kernel", "gemm", 10, 20),
        event("kernel", "gemm", 25, 15),  # overlaps the first on another stream
        event("gpu_memcpy", "Memcpy HtoD", 60, 5),
        event("kernel", "norm", 70, 10),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1),
        event("cuda_runtime", "cudaLaunchKernel", 8, 1),
        event("cuda_driver", "cuLaunchKernelEx", 9, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 90, 1),
        event("cpu_op", "aten::mm", 4, 3),
        {"ph": "i", "name": "no duration", "ts": 1},
    ]
    found = gpu.kernels.summary(events, top=1)
    assert found["of"] == "gpu"
    assert found["step_seconds"] == pytest.approx(100e-6)
    assert found["kernels"] == 4
    assert found["busy_share"] == pytest.approx((30 + 5 + 10) / 100)
    assert (found["gaps"], found["longest_gap_seconds"]) == (2, pytest.approx(20e-6))
    assert found["gap_seconds"] == pytest.approx(25e-6)
    assert found["median_gap_seconds"] == pytest.approx(12.5e-6)
    assert found["launches"] == 3
    assert found["runtime_calls"]["cudaStreamSynchronize"] == 1
    assert found["top"] == [{"name": "gemm", "seconds": pytest.approx(35e-6), "times": 2}]


def test_summary_without_a_gpu_counts_the_innermost_operators(gpu):
    events = [
        event("user_annotation", "ProfilerStep#2", 0, 50),
        event("cpu_op", "aten::linear", 10, 20),
        event("cpu_op", "aten::mm", 12, 10),
        event("cpu_op", "aten::add", 15, 5, tid=2),
    ]
    found = gpu.kernels.summary(events)
    assert (found["of"], found["kernels"]) == ("cpu", 2)
    assert {entry["name"] for entry in found["top"]} == {"aten::mm", "aten::add"}


def test_first_run_counts_every_job_once(monkeypatch, capsys, tmp_path):
    metadata = tmp_path / ".snakemake/metadata"
    (metadata / "@long").mkdir(parents=True)
    job = {"rule": "edit", "log": ["logs/a"], "starttime": 100.0, "endtime": 104.0}
    score = job | {"rule": "score", "starttime": 110.0}
    for name, record in {
        "a": job,
        "@long/b": job | {"starttime": 100.1},  # another output of the same job
        "c": job | {"log": ["logs/b"], "starttime": 102.0, "endtime": 110.0},
        "d": score | {"endtime": 111.0},
        "e": score | {"log": ["logs/b"], "endtime": None},
    }.items():
        (metadata / name).write_text(json.dumps(record))
    monkeypatch.syspath_prepend("benchmarks")
    monkeypatch.setattr(sys, "argv", ["first_run", str(tmp_path)])
    importlib.import_module("first_run").main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert ["edit", "2", "12", "6.0", "92%"] in cells
    assert ["score", "1", "1", "1.0", "8%"] in cells
    assert cells[-1][:3] == ["by the clock", "3", "11"]
