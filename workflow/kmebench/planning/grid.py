"""From the config to the grid of runs. Imports no torch: the workflow reads it while it plans.

An experiment names a mode and lists of models, data sets and methods, and may sweep
hyper-parameters; it expands to :class:`Run` values. Equal runs of two experiments are equal
values, so they share a folder and are computed once.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kmebench.editors.cards import Card, card_of, plain
from kmebench.editors.needs import Need, Paths, Pipeline
from kmebench.errors import ConfigError
from kmebench.modes import DEFAULT, in_turns, spell_mode, split_mode
from kmebench.names import nearest
from kmebench.values import DEVELOPMENT, read_all, spell_all

#: Bytes of a number by dtype.
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Pipelines. The name of one among a method's hyper-parameters holds values for it alone.
MODES = ("batch", "consecutive", "breadth_first")
N = TypeVar("N", bound=Need)


@dataclass(frozen=True, order=True)
class Run:
    """One cell of the grid: one folder ``runs/{model}/{dataset}/{mode}/{method}/...``."""

    model: str
    dataset: str
    mode: str  # with the size of a turn: kmebench.modes
    method: str
    variant: str
    seed: int

    def folder(self) -> str:
        """Path of the run below ``results/``."""
        return (
            f"runs/{self.model}/{self.dataset}/{self.mode}/{self.method}/{self.variant}"
            f"/seed{self.seed}"
        )

    @property
    def pipeline(self) -> str:
        """One of :data:`MODES`."""
        return split_mode(self.mode)[0]

    @property
    def turn(self) -> int:
        """How many requests consecutive editing hands over together."""
        return split_mode(self.mode)[1]


def runs_of(config: Mapping[str, Any], experiment: str) -> list[Run]:
    """Expand one experiment: models × data sets × methods × variants × seeds, in that order.

    Raises:
        ConfigError: the experiment names a model, data set or method that is not configured,
            or sweeps a hyper-parameter that no method of it has.
    """
    return [run for run, _ in swept_runs(config, experiment)]


def swept_runs(config: Mapping[str, Any], experiment: str) -> list[tuple[Run, dict[str, Any]]]:
    """Expand one experiment to runs, each once and with the values that its sweep gives it."""
    spec = config["experiments"][experiment]
    check_names(config, spec, f"experiments.{experiment}")
    runs = {
        Run(model, dataset, mode_of(spec), method, variant, seed): values
        for model, dataset, method in itertools.product(
            spec["models"], spec["datasets"], spec["methods"]
        )
        for variant, values in _variants(config, spec, model, dataset, method)
        for seed in spec.get("seeds", [config["seed"]])
    }
    return list(runs.items())


def figure_runs(config: Mapping[str, Any], spec: Mapping[str, Any]) -> list[tuple[Run, Any]]:
    """Return the runs that a figure shows, each with the value of the swept parameter.

    A figure of tables, of kind ``paper`` or ``sizes``, shows none itself.
    """
    if spec["kind"] in ("paper", "sizes"):
        return []
    if spec["kind"] in ("overview", "cost"):
        every = itertools.chain(*(runs_of(config, name) for name in spec["experiments"]))
        default = (DEFAULT, config["seed"])
        shown = [run for run in dict.fromkeys(every) if (run.variant, run.seed) == default]
        return [(run, DEFAULT) for run in shown]
    parameter, runs = spec.get("parameter"), []
    for run, values in swept_runs(config, spec["experiment"]):
        known = {"seed": run.seed} | values
        runs.append((run, known[parameter] if parameter else DEFAULT))
    # The nodes of a data set are the same whichever run asks for them.
    if spec["kind"] in ("nodes", "layers"):
        runs = [(run, x) for run, x in runs if needed(config, run, Paths)]
    # No edit takes no time and has no norm.
    if spec["kind"] in ("time", "norms", "edit-layers"):
        runs = [(run, x) for run, x in runs if run.method not in controls(config)]
    return runs


def pairs_of(config: Mapping[str, Any], comparison: str) -> list[tuple[str, Run, Run]]:
    """Expand one comparison: (name of the pair, run A, run B) for every model and data set.

    Raises:
        ConfigError: it names a model, data set or method that is not configured.
    """
    spec = config["comparisons"][comparison]
    where = f"comparisons.{comparison}"
    check_names(config, spec, where)
    found = []
    for name, pair in spec["pairs"].items():
        for model, dataset in itertools.product(spec["models"], spec["datasets"]):
            runs = []
            for side in (pair["a"], pair["b"]):
                method = side["method"]
                check_name(method, config["methods"], "methods", f"{where}.pairs.{name}")
                values = side.get("hparams", {})
                variant = variant_name(config, model, method, side["mode"], values)
                runs.append(Run(model, dataset, mode_of(side), method, variant, config["seed"]))
            found.append((name, *runs))
    return found


def mode_of(spec: Mapping[str, Any]) -> str:
    """Return how runs of an experiment, or of a side of a comparison, spell their mode."""
    return spell_mode(spec["mode"], spec.get("turn", 1))


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


def check_names(config: Mapping[str, Any], spec: Mapping[str, Any], where: str) -> None:
    """Refuse models, data sets and methods of an experiment or comparison that are not there.

    Raises:
        ConfigError: names the nearest defined one.
    """
    known = {"models": config["models"], "datasets": datasets(config), "methods": config["methods"]}
    for kind, names in known.items():
        for name in spec.get(kind, []):
            check_name(name, names, kind, f"{where}.{kind}")


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
        every = dataset.endswith(DEVELOPMENT)
        yield variant_name(config, model, method, spec["mode"], values, every=every), values


def variant_name(
    config: Mapping[str, Any],
    model: str,
    method: str,
    mode: str,
    values: Mapping[str, Any],
    *,
    every: bool = False,
) -> str:
    """Spell out values that differ from a method's own, or ``every`` one; ``default`` if none does.

    So a swept value equal to the configured one, or where none is to the editor's default, *is* the
    default, and is not run twice. Values are compared and spelled as the editor takes them ("1e-4"
    is 0.0001), sorted by their config names: a run has one name, however a config writes it.

    Raises:
        ConfigError: a value cannot be part of a file's name, or the editor takes no such value.
    """
    card, base = card_of_method(config, method), base_hparams(config, model, method, mode)
    spell_all(values)  # says in the config's words what no folder can be called
    configured = card.configured(values)
    own, taken = plain(card.values(base)), plain(card.values(base | configured))
    named = {key: taken[key] for key in sorted(configured) if every or taken[key] != own[key]}
    return spell_all(named) or DEFAULT


def base_hparams(config: Mapping[str, Any], model: str, method: str, mode: str) -> dict[str, Any]:
    """Merge a method's hyper-parameters in one mode with the model's own values for it."""
    merged: dict[str, Any] = {}
    for _, values in hparams_sections(config, model, method, mode):
        merged |= values
    return merged


def hparams_sections(
    config: Mapping[str, Any], model: str, method: str, mode: str
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield where a config sets hyper-parameters, and which, under their config names.

    Later places go before earlier ones.

    Method < method in this mode < model < model in this mode.
    """
    own, card = config["models"].get(model, {}).get("hparams", {}), card_of_method(config, method)
    for place, section in (
        (("methods", method, "hparams"), config["methods"][method].get("hparams", {})),
        (("models", model, "hparams", method), own.get(method, {})),
    ):
        general, by_mode = split_modes(section)
        yield place, card.configured(general)
        yield (*place, mode), card.configured(by_mode.get(mode, {}))


def split_modes(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split what a config sets for a method: for all modes, and by mode."""
    general = {key: value for key, value in section.items() if key not in MODES}
    return general, {key: dict(section[key] or {}) for key in MODES if key in section}


def values_of(config: Mapping[str, Any], run: Run) -> Any:
    """Return the hyper-parameters of a run: editor's defaults < method < model < variant.

    Of a method's and of a model's own values those for the run's mode go before the general ones.

    Raises:
        ConfigError: the editor has no such hyper-parameter, or it cannot be that.
    """
    card = card_of_method(config, run.method)
    base = base_hparams(config, run.model, run.method, run.pipeline)
    return card.values(base | card.configured(parse_variant(run.variant)))


def hparams_of(config: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return all hyper-parameters of a run under their config names, defaults resolved.

    Sorted, because Snakemake takes another order of a parameter for a change.
    """
    return dict(sorted(plain(values_of(config, run)).items()))


def parse_variant(variant: str) -> dict[str, Any]:
    """Read a variant back: ``paths=20+layers=1:2`` -> {"paths": 20, "layers": [1, 2]}."""
    return {} if variant == DEFAULT else read_all(variant)


def editor_of(config: Mapping[str, Any], method: str) -> str:
    """Return the editor behind a method, by default of the same name."""
    return str(config["methods"][method].get("editor", method))


def card_of_method(config: Mapping[str, Any], method: str) -> Card:
    """Return the card of the editor behind a method.

    Raises:
        ConfigError: there is no such editor.
    """
    return card_of(editor_of(config, method))


def controls(config: Mapping[str, Any]) -> list[str]:
    """Return the methods that are rows to compare with, never rivals."""
    return [method for method in config["methods"] if card_of_method(config, method).control]


def measures_health(config: Mapping[str, Any], mode: str) -> bool:
    """Whether the runs of a pipeline measure the health of the models that they leave."""
    return mode != "batch" and config["health"]["texts"] > 0


def load_of(config: Mapping[str, Any], model: str) -> dict[str, str]:
    """Return how a model is loaded: its dtype, and its device or the general one."""
    spec = config["models"][model]
    return {"dtype": spec["dtype"], "device": spec.get("device", config["device"])}


def needs_of(config: Mapping[str, Any], run: Run) -> tuple[Need, ...]:
    """Return the files of cached stages that a run reads."""
    pipeline = Pipeline(run.pipeline, config["batch_size"], run.turn)
    return card_of_method(config, run.method).needs_of(values_of(config, run), pipeline)


def needed(config: Mapping[str, Any], run: Run, kind: type[N]) -> N | None:
    """Return what a run reads of one kind of cached stage; None if nothing."""
    return next((need for need in needs_of(config, run) if isinstance(need, kind)), None)


def covariance_layers(config: Mapping[str, Any], run: Run) -> set[int]:
    """Return the layers whose covariance, or what is computed of it, a run reads."""
    return {layer for need in needs_of(config, run) for layer in need.covariance_layers}


def measured_layers(config: Mapping[str, Any], model: str) -> list[int]:
    """Return the layers of a model whose covariance is measured for its runs."""
    runs = (run for run in all_runs(config) if run.model == model)
    return sorted(set[int]().union(*(covariance_layers(config, run) for run in runs)))


def describe(config: Mapping[str, Any]) -> str:
    """Describe the grid in lines: experiments, runs, edits."""
    lines = []
    for name, spec in config["experiments"].items():
        runs = runs_of(config, name)
        lines.append(
            f"{name}: {len(runs)} runs ({spec['mode']}{in_turns(mode_of(spec))}; "
            f"{len(spec['models'])} models x "
            f"{len(spec['datasets'])} data sets x {len(spec['methods'])} methods)"
        )
    used = {run.dataset for run in all_runs(config)}
    edits = {name: count for name, count in datasets(config).items() if name in used}
    total = sum(edits[run.dataset] for run in all_runs(config))
    lines.append(f"in all {len(all_runs(config))} distinct runs, {total} edits")
    lines += [f"  {name}: {count} edits per run" for name, count in edits.items()]
    return "\n".join(lines)
