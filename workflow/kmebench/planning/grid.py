"""From the config to the grid of runs. Imports no torch: the workflow reads it while it plans.

An experiment names a mode and lists of models, data sets and methods, and may sweep
hyper-parameters; it expands to :class:`Run` values. Equal runs of two experiments are equal
values, so they share a folder and are computed once.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kmebench.editors.registry import editor_target
from kmebench.errors import ConfigError
from kmebench.names import nearest
from kmebench.values import read, spell

DEFAULT = "default"
#: Joins the parts of a file's name. Not a comma: Snakemake's jobs on a cluster fail at one.
JOIN = "+"
#: Bytes of a number by dtype.
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Pipelines. The name of one among a method's hyper-parameters holds values for it alone.
MODES = ("batch", "consecutive", "breadth_first")
#: ``{dataset}.development`` is the held-out split of a data set, itself a data set to run on.
DEVELOPMENT = ".development"

#: Hyper-parameters of PAC that decide which paths are selected, with their defaults; they and
#: nothing else name a path file.
PATH_SETTINGS: dict[str, Any] = {
    "score": "l2",
    "scope": "edit",
    "selection": "disjoint",
    "paths": 15,
    "negatives": 1,
}

#: All that ablations sweep, with PAC's defaults: a value equal to one is no variant.
PAC_DEFAULTS = PATH_SETTINGS | {"lambda": 0.1, "trace_on": "original"}

_MEMIT: dict[str, Any] = {
    "layers": (4, 5, 6, 7, 8),
    "steps": 25,
    "learning_rate": 0.5,
    "kl_factor": 0.0625,
    "weight_decay": 1e-3,
    "clamp_factor": 4.0,
    "kl_position": "subject_last",
}
#: Editors that read second moments, with the defaults of what decides which: the layers that they
#: edit and, for MEMIT's family, the loss that makes its targets.
LOCATE_AND_EDIT: dict[str, dict[str, Any]] = {
    "rome": {"layer": 5},
    "r-rome": {"layer": 5},
    "memit": _MEMIT,
    "pmet": _MEMIT | {"steps": 20, "weight_decay": 0.5, "clamp_factor": 1.0},
    "emmet": _MEMIT | {"layers": (5,)},
    "alphaedit": _MEMIT,
    "prune": _MEMIT,
    "rect": _MEMIT,
}


@dataclass(frozen=True, order=True)
class Run:
    """One cell of the grid: one folder ``runs/{model}/{dataset}/{mode}/{method}/...``."""

    model: str
    dataset: str
    mode: str
    method: str
    variant: str
    seed: int

    def folder(self) -> str:
        """Path of the run below ``results/``."""
        return (
            f"runs/{self.model}/{self.dataset}/{self.mode}/{self.method}/{self.variant}"
            f"/seed{self.seed}"
        )


def runs_of(config: Mapping[str, Any], experiment: str) -> list[Run]:
    """Expand one experiment: models × data sets × methods × variants × seeds, in that order.

    Raises:
        ConfigError: the experiment names a model, data set or method that is not configured,
            or sweeps a hyper-parameter that no method of it has.
    """
    return [run for run, _ in swept_runs(config, experiment)]


def swept_runs(config: Mapping[str, Any], experiment: str) -> list[tuple[Run, dict[str, Any]]]:
    """Expand one experiment to runs, each with the values that its sweep gives it."""
    spec = config["experiments"][experiment]
    known = {"models": config["models"], "datasets": datasets(config), "methods": config["methods"]}
    for kind, names in known.items():
        for name in spec[kind]:
            check_name(name, names, kind, f"experiments.{experiment}.{kind}")
    return [
        (Run(model, dataset, spec["mode"], method, variant, seed), values)
        for model, dataset, method in itertools.product(
            spec["models"], spec["datasets"], spec["methods"]
        )
        for variant, values in _variants(config, spec, model, dataset, method)
        for seed in spec.get("seeds", [config["seed"]])
    ]


def pairs_of(config: Mapping[str, Any], comparison: str) -> list[tuple[str, Run, Run]]:
    """Expand one comparison: (name of the pair, run A, run B) for every model and data set.

    Raises:
        ConfigError: it names a model, data set or method that is not configured.
    """
    spec = config["comparisons"][comparison]
    where = f"comparisons.{comparison}"
    for kind, known in (("models", config["models"]), ("datasets", datasets(config))):
        for name in spec[kind]:
            check_name(name, known, kind, f"{where}.{kind}")
    found = []
    for name, pair in spec["pairs"].items():
        for model, dataset in itertools.product(spec["models"], spec["datasets"]):
            runs = []
            for side in (pair["a"], pair["b"]):
                method = side["method"]
                check_name(method, config["methods"], "methods", f"{where}.pairs.{name}")
                mode, values = side["mode"], side.get("hparams", {})
                variant = variant_name(config, model, method, mode, values)
                runs.append(Run(model, dataset, mode, method, variant, config["seed"]))
            found.append((name, *runs))
    return found


def all_runs(config: Mapping[str, Any]) -> list[Run]:
    """Return every run of every experiment and comparison once, sorted."""
    runs = {run for name in config["experiments"] for run in runs_of(config, name)}
    for name in config.get("comparisons", {}):
        runs |= {run for _, *sides in pairs_of(config, name) for run in sides}
    return sorted(runs)


def datasets(config: Mapping[str, Any]) -> dict[str, int]:
    """Return every data set that can be run on, and its number of requests.

    The development split of a data set is one too: tuning takes the same way as reporting.
    """
    sizes: dict[str, int] = {}
    for name, spec in config["datasets"].items():
        segments = spec.get("segments")
        sizes[name] = sum(stop - start for start, stop in segments) if segments else spec["n"]
        if spec.get("development"):
            sizes[name + DEVELOPMENT] = spec["development"]
    return sizes


def check_name(name: str, known: Iterable[str], kind: str, where: str) -> None:
    """Refuse a name that the config does not define.

    Raises:
        ConfigError: names the nearest defined one.
    """
    if name not in known:
        raise ConfigError(
            f"{where} names {name!r}, which {kind} does not define; {nearest(name, known)}"
        )


def _variants(
    config: Mapping[str, Any], spec: Mapping[str, Any], model: str, dataset: str, method: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the variants of a method with the values that make them.

    On a development split every swept value is spelled out: the tuned values that come from such
    a sweep change what is configured, and must not rename (and so repeat) the search itself.
    """
    sweep = spec.get("sweep", {})
    for combination in itertools.product(*sweep.values()):
        values = dict(zip(sweep, combination, strict=True))
        if dataset.endswith(DEVELOPMENT):
            yield _spell(values), values
        else:
            yield variant_name(config, model, method, spec["mode"], values), values


def variant_name(
    config: Mapping[str, Any], model: str, method: str, mode: str, values: Mapping[str, Any]
) -> str:
    """Spell out values that differ from a method's own; ``default`` if none does.

    So a swept value equal to the configured one, or where none is to the editor's default, *is* the
    default, and is not run twice.
    """
    editor = editor_of(config, method)
    defaults = PAC_DEFAULTS if editor == "pac" else LOCATE_AND_EDIT.get(editor, {})
    known = defaults | base_hparams(config, model, method, mode)
    return _spell({k: v for k, v in values.items() if k not in known or _plain(known[k]) != v})


def _plain(value: Any) -> Any:
    """An editor's default as YAML would hold it: a list instead of a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _spell(values: Mapping[str, Any]) -> str:
    """Name a file by values, such that :func:`parse_variant` reads them back.

    Raises:
        ConfigError: a value cannot be part of a file's name.
    """
    parts = []
    for key, value in values.items():
        try:
            parts.append(f"{key}={spell(value)}")
        except ValueError as error:
            raise ConfigError(
                f"{key}: {error}: make it a method of its own, with that hyper-parameter."
            ) from error
    return JOIN.join(parts) or DEFAULT


def base_hparams(config: Mapping[str, Any], model: str, method: str, mode: str) -> dict[str, Any]:
    """Merge a method's hyper-parameters in one mode with the model's own values for it."""
    own = config["models"].get(model, {}).get("hparams", {}).get(method, {})
    merged: dict[str, Any] = {}
    for section in (config["methods"][method].get("hparams", {}), own):
        general, by_mode = split_modes(section)
        merged |= general | by_mode.get(mode, {})
    return merged


def split_modes(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split what a config sets for a method: for all modes, and by mode."""
    general = {key: value for key, value in section.items() if key not in MODES}
    return general, {key: dict(section[key] or {}) for key in MODES if key in section}


def hparams_of(config: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return the hyper-parameters of a run: method < model < variant; sorted by name.

    Of a method's and of a model's own values those for the run's mode go before the general ones.

    Sorted, because Snakemake takes another order of a parameter for a change.
    """
    base = base_hparams(config, run.model, run.method, run.mode)
    merged = base | parse_variant(run.variant)
    return dict(sorted(merged.items()))


def parse_variant(variant: str) -> dict[str, Any]:
    """Read a variant back: ``paths=20+layers=1:2`` -> {"paths": 20, "layers": [1, 2]}."""
    if variant == DEFAULT:
        return {}
    pairs = (item.partition("=") for item in variant.split(JOIN))
    return {key: read(text) for key, _, text in pairs}


def is_pac(config: Mapping[str, Any], method: str) -> bool:
    """Whether a method is PAC and so may read cached paths."""
    return editor_of(config, method) == "pac"


def editor_of(config: Mapping[str, Any], method: str) -> str:
    """Return the editor behind a method (by default of the same name).

    Raises:
        ConfigError: there is no such editor.
    """
    editor = config["methods"][method].get("editor", method)
    editor_target(editor)
    return editor


def needs_paths(config: Mapping[str, Any], run: Run) -> bool:
    """Whether a run reads cached paths: PAC that traces the original model."""
    traced = hparams_of(config, run).get("trace_on", "original") == "original"
    return is_pac(config, run.method) and traced


def needs_moments(config: Mapping[str, Any], run: Run) -> bool:
    """Whether a run reads second moments."""
    return editor_of(config, run.method) in LOCATE_AND_EDIT and hparams_of(config, run).get(
        "second_moment", True
    )


def moment_layers(config: Mapping[str, Any], model: str) -> list[int]:
    """Return the layers of a model whose second moments its runs read."""
    layers: set[int] = set()
    for run in all_runs(config):
        if run.model == model and needs_moments(config, run):
            layers |= edited_layers(editor_of(config, run.method), hparams_of(config, run))
    return sorted(layers)


def edited_layers(editor: str, hparams: Mapping[str, Any]) -> set[int]:
    """Return the layers that a locate-and-edit editor edits."""
    known = LOCATE_AND_EDIT[editor] | dict(hparams)
    return {known["layer"]} if "layer" in known else set(known["layers"])


def target_of(config: Mapping[str, Any], run: Run) -> str | None:
    """Name the target file of a run, e.g. ``site=layer+layer=8+steps=25+learning_rate=0.5+...``.

    None for runs that optimise their targets themselves: on a model with earlier edits they are
    others, so only batch mode, which edits the original model, shares them. The name can be read
    by :func:`parse_variant`.
    """
    editor = editor_of(config, run.method)
    if run.mode != "batch" or "steps" not in LOCATE_AND_EDIT.get(editor, {}):
        return None
    hparams = LOCATE_AND_EDIT[editor] | hparams_of(config, run)
    site = "attention-value" if editor == "pmet" else "layer"
    # A value spelled 4 or "1e-3" in YAML names the same file as 4.0 or 0.001.
    settings = {key: type(_MEMIT[key])(hparams[key]) for key in _MEMIT if key != "layers"}
    return _spell({"site": site, "layer": hparams["layers"][-1]} | settings)


def controls(config: Mapping[str, Any]) -> list[str]:
    """Return the methods that are rows to compare with, never rivals."""
    methods = config["methods"].items()
    return [name for name, spec in methods if card_of(spec.get("editor", name)).control]


def measures_health(config: Mapping[str, Any], mode: str) -> bool:
    """Whether the runs of a pipeline measure the health of the models that they leave."""
    return mode != "batch" and config["health"]["texts"] > 0


def selection_of(config: Mapping[str, Any], run: Run) -> str:
    """Name the path file of a run, e.g. ``l2+edit+disjoint+paths=15+negatives=1``.

    Requests edited one at a time are their own batch, so there scope is always ``edit``.
    """
    settings = PATH_SETTINGS | {
        key: value for key, value in hparams_of(config, run).items() if key in PATH_SETTINGS
    }
    scope = settings["scope"] if run.mode == "batch" else "edit"
    if scope == "batch":
        scope = f"batch={config['batch_size']}"
    numbers = [f"{name}={settings[name]}" for name in ("paths", "negatives")]
    return JOIN.join([settings["score"], scope, settings["selection"], *numbers])


def parse_selection(selection: str) -> dict[str, Any]:
    """Read the name of a path file back: score, group (requests), selection, paths, negatives."""
    score, scope, kind, paths, negatives = selection.split(JOIN)
    return {
        "score": score,
        "group": int(scope.partition("=")[2] or 1),
        "selection": kind,
        "paths": int(paths.removeprefix("paths=")),
        "negatives": int(negatives.removeprefix("negatives=")),
    }


def plan(config: Mapping[str, Any]) -> str:
    """Describe the grid in lines: experiments, runs, edits."""
    lines = []
    for name, spec in config["experiments"].items():
        runs = runs_of(config, name)
        lines.append(
            f"{name}: {len(runs)} runs ({spec['mode']}; {len(spec['models'])} models x "
            f"{len(spec['datasets'])} data sets x {len(spec['methods'])} methods)"
        )
    used = {run.dataset for run in all_runs(config)}
    edits = {name: count for name, count in datasets(config).items() if name in used}
    total = sum(edits[run.dataset] for run in all_runs(config))
    lines.append(f"in all {len(all_runs(config))} distinct runs, {total} edits")
    lines += [f"  {name}: {count} edits per run" for name, count in edits.items()]
    return "\n".join(lines)
