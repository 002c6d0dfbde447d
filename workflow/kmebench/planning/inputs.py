"""What the rules of the workflow read and are told, from data to runs. Imports no torch.

A rule names a method of :class:`Inputs` where Snakemake takes a function of the wildcards.
Paths begin with Snakemake's own ``<results>``.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kmebench.devices import uses_gpu
from kmebench.editors.cards import card_of
from kmebench.editors.needs import Covariance, Encoder, Hypernetwork, Paths, Targets, Trained
from kmebench.io import origins
from kmebench.io.headers import read_header
from kmebench.modes import DEFAULT
from kmebench.planning import grid, memory
from kmebench.planning.dependencies import code
from kmebench.planning.wildcards import Wildcards
from kmebench.values import TRAINING

OPENFACTS = "resources/openfacts"
#: What path files and target files are called, as patterns of Snakemake.
SELECTION = r"\w+\+[\w=]+\+\w+\+paths=\d+\+negatives=\d+"
METRIC = r"layers=[\d:]+\+tokens=\d+\+seed=\d+"
TARGET = r"site=[\w-]+\+layer=\d+\+[^/]+"
#: A mode, as :func:`kmebench.modes.spell_mode` spells it.
MODE = r"batch|breadth_first|consecutive(?:\+turn=\d+)?"
#: A variant, as :func:`kmebench.planning.grid.variant_name` spells it.
VARIANT = rf"{DEFAULT}|[A-Za-z_]\w*=[^/]+"
#: Minutes that a job with a model asks for. A retry asks for no more, because partitions have
#: limits: a run that takes longer saves what it has done, and the retry goes on.
MINUTES = 720
#: Keys of a data set that decide what is selected from it.
_SELECTED = (
    *("schema", "n", "seed", "segments", "development", "training"),
    *("conflicts", "on_bad_record"),
)


def one_of(names: Iterable[str]) -> str:
    """Return a wildcard constraint: one of a closed list of names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def openfacts_tables() -> list[str]:
    """Return the fact tables of this repository."""
    return sorted(str(path) for path in Path(OPENFACTS, "facts").glob("*.csv"))


@dataclass(frozen=True)
class Inputs:
    """Inputs, parameters and resources of rules, from a checked config.

    ``results`` is the folder that ``<results>`` stands for; ``mirror`` is searched for data files
    before any URL, unless it is empty; ``elsewhere`` says whether other machines run the jobs.
    """

    config: Mapping[str, Any]
    results: str
    mirror: str
    elsewhere: Callable[[], bool] = lambda: False

    # -- data and models ------------------------------------------------------------------------

    def openfacts(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the fact tables, for a data set made of them."""
        if self.config["datasets"][wildcards.data]["source"]["source"] != "openfacts":
            return {}
        return {"relations": f"{OPENFACTS}/relations.json", "facts": openfacts_tables()}

    def users_data_file(self, dataset: str) -> Path | None:
        """Return the user's own file in the mirror folder, which a data set is taken from."""
        source = self.config["datasets"][dataset]["source"]
        return origins.mirror_file(source.get("filenames", []), self.mirror)

    def data_content(self, wildcards: Wildcards) -> str | None:
        """Return the content of the user's data file, unless the config pins it."""
        pinned = "sha256" in self.config["datasets"][wildcards.data]["source"]
        file = None if pinned else self.users_data_file(wildcards.data)
        return origins.parameter(file, f"{self.results}/data/raw/{wildcards.data}.origin.json")

    def selection(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what is selected from a data set."""
        spec = self.config["datasets"][wildcards.data]
        return {key: spec[key] for key in _SELECTED if key in spec}

    def left_out(self, wildcards: Wildcards) -> list[str]:
        """Return the files of the data sets whose records another one leaves out."""
        names = self.config["datasets"][wildcards.data]["leave_out"]
        return [f"<results>/data/{name}.jsonl" for name in names]

    def on_bad_record(self, wildcards: Wildcards) -> str:
        """Return what becomes of requests that cannot be used, or are too long for a model."""
        spec = self.config["datasets"][wildcards.dataset.removesuffix(grid.DEVELOPMENT)]
        return str(spec.get("on_bad_record", "error"))

    @cached_property
    def trained_models(self) -> list[str]:
        """The models that the workflow trains itself."""
        models = self.config["models"].items()
        return [name for name, spec in models if spec["source"]["source"] == "tiny"]

    @cached_property
    def fetched_models(self) -> list[str]:
        """The models that come from elsewhere."""
        return [name for name in self.config["models"] if name not in self.trained_models]

    def model_source(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return where a model comes from."""
        return dict(self.config["models"][wildcards.model]["source"])

    def model_content(self, wildcards: Wildcards) -> str | None:
        """Return the content of the user's folder or file, for a model that is one."""
        note = f"{self.results}/models/{wildcards.model}/{origins.NOTE}"
        return origins.parameter(self.model_source(wildcards).get("path"), note)

    @property
    def encoder_source(self) -> dict[str, Any]:
        """Return where the sentence encoder comes from."""
        return dict(self.config["encoder"]["source"])

    def encoder_content(self, wildcards: Wildcards) -> str | None:
        """Return the content of the user's folder, for an encoder that is one."""
        note = f"{self.results}/{Encoder().path('', '')}/{origins.NOTE}"
        return origins.parameter(self.encoder_source.get("path"), note)

    def load(self, wildcards: Wildcards) -> dict[str, str]:
        """Return how a job's model is loaded."""
        return grid.load_of(self.config, wildcards.model)

    def device(self, wildcards: Wildcards) -> str:
        """Return where a job's model lies."""
        return self.load(wildcards)["device"]

    @property
    def devices(self) -> set[str]:
        """Where the models of all runs lie."""
        return {grid.load_of(self.config, run.model)["device"] for run in self.runs}

    # -- cached stages --------------------------------------------------------------------------

    def askable(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return which requests cached stages leave out: the same as predictions.

        Where none may be left out, predictions refuse what is too long, and how long answers may
        be concerns them alone.
        """
        answer = self.on_bad_record(wildcards)
        wild = self.config["evaluation"]["wild_max_tokens"] if answer == "skip" else 0
        return {"wild_max_tokens": wild, "on_bad_record": answer}

    def paths(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a path file is selected by."""
        return asdict(Paths.parse(wildcards.selection))

    def targets(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what targets are optimised by."""
        return asdict(Targets.parse(wildcards.target))

    def covariance_layers(self, wildcards: Wildcards) -> list[int]:
        """Return the layers whose covariance is measured for the runs of a model.

        Those that the file holds stay, though runs of another config alone read them: so configs
        that share a results folder do not measure again in turn.
        """
        layers = grid.measured_layers(self.config, wildcards.model)
        file = Path(self.results, Covariance(()).path(wildcards.model, ""))
        held = read_header(file, Covariance.form)["facts"]["layers"] if file.is_file() else []
        return sorted({*layers, *held})

    def text_content(self, wildcards: Wildcards) -> str | None:
        """Return the content of the user's text, if the covariance is taken over one."""
        note = f"{self.results}/covariance/{wildcards.model}.origin.json"
        return origins.parameter(self.config["covariance"]["text"].get("path"), note)

    def stage(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a trained stage reads: model, development split, its code, the encoder."""
        need = Trained.parse(wildcards.trained)
        encoder = Encoder().path(wildcards.model, wildcards.dataset)
        return {
            "model": f"<results>/models/{wildcards.model}",
            "requests": f"<results>/data/{wildcards.dataset}{grid.DEVELOPMENT}.jsonl",
            "code": code("train_stage", need.function.partition(":")[0]),
        } | ({"encoder": f"<results>/{encoder}"} if need.reads_encoder else {})

    def trained(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the function of a trained stage and its settings."""
        need = Trained.parse(wildcards.trained)
        return {"function": need.function, "settings": need.settings}

    def training_split(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a hyper-network is trained on and by: model, training split, code."""
        module = card_of(wildcards.editor).module
        return {
            "model": f"<results>/models/{wildcards.model}",
            "requests": f"<results>/data/{wildcards.dataset}{TRAINING}.jsonl",
            "code": code("hypernetwork", module),
        }

    def hypernetwork(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the editor of a hyper-network and its hyper-parameters."""
        return asdict(Hypernetwork.parse(wildcards.editor, wildcards.settings))

    # -- runs -----------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> list[grid.Run]:
        """Every run of every experiment and comparison, once."""
        return grid.all_runs(self.config)

    def edit(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a run reads, and nothing that it does not."""
        run = _run_of(wildcards)
        module = grid.card_of_method(self.config, run.method).module
        neutral = {"neutral": f"<results>/original/{run.model}/neutral.safetensors"}
        return {
            "model": f"<results>/models/{run.model}",
            "requests": f"<results>/data/{run.dataset}.jsonl",
            "original": f"<results>/original/{run.model}/{run.dataset}.parquet",
            "code": code("edit", module),
            **(neutral if grid.measures_health(self.config, run.mode) else {}),
        } | {
            need.key: f"<results>/{need.path(run.model, run.dataset)}"
            for need in grid.needs_of(self.config, run)
        }

    def settings(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return everything that decides the outcome of a run, defaults resolved, and no more.

        How often a run saves decides nothing, and neither does what it does where an edit fails: of
        a run that has finished under ``error`` none did, and ``skip`` gives the same bytes.
        """
        run, config = _run_of(wildcards), self.config
        of_pipeline = {"batch": "batch_size", "consecutive": "milestone_sample"}
        own = {key: config[key] for name, key in of_pipeline.items() if name == run.pipeline}
        return {
            "mode": run.mode,
            "editor": grid.editor_of(config, run.method),
            "hparams": grid.hparams_of(config, run),
            "seed": run.seed,
            **own,
            "on_bad_record": self.on_bad_record(wildcards),
            "load": self.load(wildcards),
            "evaluation": config["evaluation"],
        }

    # -- resources ------------------------------------------------------------------------------

    def gpus(self, wildcards: Wildcards) -> int:
        """Return the GPUs that a job with a model asks for."""
        return self.gpus_of(wildcards.model)

    def gpus_of(self, model: str) -> int:
        """Return one GPU, unless the model runs on the CPU."""
        device = grid.load_of(self.config, model)["device"]
        return int(uses_gpu(device, elsewhere=self.elsewhere()))

    def memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the main memory in MB that a job which asks a model takes; more after a failure.

        So do the methods below, for jobs that do more.
        """
        return self.memory_of(wildcards.model, attempt)

    def memory_of(self, model: str, attempt: int) -> int:
        """Return the memory of a job that asks a model."""
        return _megabytes(memory.asked_by_model(self.config, model), attempt)

    def tracing_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of tracing requests."""
        return _megabytes(memory.asked_by_trace(self.config, wildcards.model), attempt)

    def covariance_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of measuring the covariance of all layers that runs read."""
        layers = len(self.covariance_layers(wildcards))
        return _megabytes(memory.asked_by_covariance(self.config, wildcards.model, layers), attempt)

    def factor_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of inverting the covariance, or of finding its eigenvectors."""
        w = wildcards
        return _megabytes(memory.asked_by_factor(self.config, w.model, w.factor), attempt)

    def metric_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of measuring the neutral metric."""
        return _megabytes(memory.asked_by_metric(self.config, wildcards.model), attempt)

    def target_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of optimising targets."""
        layer = Targets.parse(wildcards.target).layer
        return _megabytes(memory.asked_by_targets(self.config, wildcards.model, layer), attempt)

    def training_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of training what an editor learns."""
        need = Trained.parse(wildcards.trained)
        return _megabytes(memory.asked_by_training(self.config, wildcards.model, need), attempt)

    def hypernetwork_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of training a hyper-network."""
        need = Hypernetwork.parse(wildcards.editor, wildcards.settings)
        return _megabytes(memory.asked_by_network(self.config, wildcards.model, need), attempt)

    def editing_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of a run."""
        return _megabytes(memory.asked_by_run(self.config, _run_of(wildcards)), attempt)


def _megabytes(size: float, attempt: int) -> int:
    return attempt * math.ceil(size / 1e6)


def _run_of(wildcards: Wildcards) -> grid.Run:
    """Return the run that a rule's wildcards name."""
    w = wildcards
    return grid.Run(w.model, w.dataset, w.mode, w.method, w.variant, int(w.seed))
