"""Peak memory of a run of every editor, beside what its rule asks for.

python benchmarks/memory.py --model FOLDER [--sizes 1 20] [--methods pac memit]

Each run is a fresh process on the CPU: it loads the model, edits one request in consecutive mode,
or a batch, asks and saves. Two steps of optimisation hold all that many do. Inverses and spectra
of covariances are made up; sizes alone count. Linux.
"""

import argparse
import itertools
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kmebench.editors.needs import (
    Development,
    Encoder,
    Hypernetwork,
    Inverse,
    Need,
    NeutralMetric,
    Pipeline,
    Spectrum,
    Trained,
)
from kmebench.planning.config import read_checked_config, read_config
from kmebench.planning.grid import Run, base_hparams, card_of_method
from kmebench.planning.memory import asked_by_run

HEADER = ["method", "requests", "measured (GB)", "asked (GB)", "asked / measured"]
#: Values that decide how long an edit takes, and not what it holds at once.
SHORT = {"steps": 2, "epochs": 1, "prompts": 2}


def hparams_of(config: Mapping[str, Any], model: str, method: str, size: int) -> dict[str, Any]:
    """What is configured, made short; no stage of a data set is cached here."""
    mode, card = "batch" if size > 1 else "consecutive", card_of_method(config, method)
    short = {name: value for name, value in SHORT.items() if name in card.names}
    return base_hparams(config, model, method, mode) | dict(card.single) | short


def measure(arguments: argparse.Namespace, method: str, size: int) -> int:
    """Peak memory in bytes of one run, in this process."""
    import torch
    from common import openfacts_requests, peak_memory

    from kmebench.editors.base import build_editor
    from kmebench.evaluation.predict import Settings
    from kmebench.models.editable import EditableModel
    from kmebench.pipelines.checkpoints import Checkpoints
    from kmebench.pipelines.pipelines import Setup
    from kmebench.pipelines.run import run_pipeline

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config, name = read_config(Path("config.yaml")), arguments.model.name
    hparams, card = hparams_of(config, name, method, size), card_of_method(config, method)
    mode = "batch" if size > 1 else "consecutive"
    model = EditableModel.load(arguments.model, dtype=arguments.dtype, device="cpu")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        needs = card.needs_of(card.values(hparams), Pipeline("consecutive", 1))
        kinds = {need.asset: need for need in needs}
        made = {asset: made_up(Path(folder), need, model) for asset, need in kinds.items()}
        editor = build_editor(card.name, hparams, {n.key: made[n.asset] for n in needs})
        editor.name = card.name
        checkpoints = Checkpoints(Path(folder, "checkpoints"), 10, {})
        setup = Setup(model, editor, Settings(wild_max_tokens=6), checkpoints)
        settings = {"mode": mode, "batch_size": size, "seed": 0, "milestone_sample": None}
        outcome = run_pipeline(setup, openfacts_requests(size), settings)
        if outcome.edit is not None:
            outcome.edit.save(Path(folder, "delta.safetensors"))
    return peak_memory(model)


def made_up(folder: Path, need: Need, model: Any) -> Path:
    """Write what an editor reads; a factor is of a diagonal C, seven tenths unused."""
    import torch
    from common import made_up_metric, made_up_network, made_up_texts, made_up_trained

    from kmebench.editors.locate.covariance.factors import FORMAT
    from kmebench.io.tensors import write_tensors

    kind, path, width = need.asset, folder / need.asset, model.ffn_width
    if isinstance(need, Hypernetwork):
        made_up_network(path, model, need)
        return path
    if kind in (Encoder.asset, Development.asset):
        return made_up_texts(folder)[kind]
    if isinstance(need, Trained):
        return made_up_trained(path, need, made_up_texts(folder)["encoder"])
    if kind == NeutralMetric.asset:
        made_up_metric(path, model)
        return path
    unused = round(0.7 * width)
    values = torch.cat([torch.full((unused,), 1e-3), torch.ones(width - unused)]).double()
    tensors = {Inverse.asset: torch.diag(1 / values)}
    if kind == Spectrum.asset:
        tensors = {"values": values, "vectors": torch.eye(width, dtype=torch.float64)}
    write_tensors(path, tensors, FORMAT, {})
    return path


def measured(arguments: argparse.Namespace, method: str, size: int) -> int:
    """Peak memory in bytes of one run, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", method, str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def asked(
    arguments: argparse.Namespace, config: Mapping[str, Any], method: str, size: int
) -> float:
    """Bytes that the rule asks for a run of so many requests."""
    name, dataset = arguments.model.name, next(iter(config["datasets"]))
    config["models"].setdefault(name, {})
    config["models"][name] |= {"shape": shape_of(arguments.model), "dtype": arguments.dtype}
    config["datasets"][dataset]["n"] = size
    mode = "batch" if size > 1 else "consecutive"
    return asked_by_run(config, Run(name, dataset, mode, method, "default", 0))


def shape_of(folder: Path) -> dict[str, int]:
    """The shape of a model, as the config says it."""
    config = json.loads((folder / "config.json").read_text())
    index = read_tensors(folder / "model.safetensors")
    return {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "ffn_width": config["intermediate_size"],
        "parameters": sum(math.prod(shape) for shape in index),
    }


def read_tensors(file: Path) -> list[list[int]]:
    """The shapes of all tensors of a safetensors file."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", type=Path, default=Path("results/models/qwen2.5-coder-0.5b"))
    options.add_argument("--dtype", default="float32")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 20])
    options.add_argument("--methods", nargs="+", help="some of the rows (default: all)")
    options.add_argument("--scratch", type=Path, help="folder for gigabytes of files")
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        print(measure(arguments, arguments.one[0], int(arguments.one[1])))
        return
    print(row(HEADER), row("-" * len(name) for name in HEADER), sep="\n")
    config = read_checked_config(Path("config.yaml"))
    for method, size in itertools.product(arguments.methods or config["methods"], arguments.sizes):
        peak, wanted = measured(arguments, method, size), asked(arguments, config, method, size)
        sizes = f"{peak / 1e9:.2f}", f"{wanted / 1e9:.2f}", f"{wanted / peak:.2f}"
        print(row([method, str(size), *sizes]), flush=True)


if __name__ == "__main__":
    main()
