"""The config: its files merged, and checked before anything is planned. Imports no torch."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match
from snakemake.utils import update_config

from kmebench.editors.needs import (
    RULES,
    Development,
    Hypernetwork,
    Need,
    Trained,
    check_length,
)
from kmebench.errors import ConfigError
from kmebench.names import nearest
from kmebench.planning import grid
from kmebench.planning.complaints import Files, sentence, wrong_at
from kmebench.planning.hparams import check_hparams, check_layers
from kmebench.planning.notebooks import NOTEBOOKS
from kmebench.planning.overlays import read_overlay

#: The config of this workflow, in its folder.
CONFIG = Path("config.yaml")
SCHEMA = Path(__file__).with_name("config.schema.yaml")
#: Keys of version 0.1.0.
_RENAMED = {"moments": "covariance"}
#: Sections whose entries an overlay takes out by setting them to null.
_REMOVABLE = ("experiments", "tables", "figures", "comparisons")


def read_config(path: Path, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a config as the Snakefile does: the files of :func:`read_files`, merged key by key."""
    return merged(read_files(path, overlays))


def merged(files: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the files of a config key by key; later ones win."""
    config: dict[str, Any] = {}
    for part in files.values():
        update_config(config, part)
    return config


def read_files(path: Path, overlays: Sequence[Path] = ()) -> dict[Path, dict[str, Any]]:
    """Read the files of a config: the file, the tuned values beside it, then overlays.

    Raises:
        ConfigError: a file is missing, or is not YAML; see :func:`read_overlay`.
    """
    if not path.exists():
        raise ConfigError(f"There is no config {path}; run this in the folder of KME-Bench.")
    tuned = sorted(path.parent.glob("config/tuned/*.yaml"))
    return {part: read_overlay(part) for part in (path, *tuned, *overlays)}


def read_checked_config(path: Path, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a config with overlays, fill in its defaults, and check it against the schema.

    Raises:
        ConfigError: as :func:`read_config` and :func:`check_config`.
    """
    files = read_files(path, overlays)
    config = merged(files)
    check_config(config, files)
    return config


@cache
def _schema() -> dict[str, Any]:
    # The loader in C, where there is one: the command line reads this file each time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(SCHEMA.read_text(encoding="utf-8"), Loader=loader)


def _fill(validator: Any, properties: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    """JSON schema's ``properties``, but defaults are filled in (as jsonschema's FAQ shows)."""
    for name, rules in properties.items():
        if "default" in rules:
            instance.setdefault(name, copy.deepcopy(rules["default"]))
    yield from Draft202012Validator.VALIDATORS["properties"](
        validator, properties, instance, schema
    )


_Filling = validators.extend(Draft202012Validator, {"properties": _fill})


def check_config(config: dict[str, Any], files: Files | None = None) -> None:
    """Validate a config against its schema, fill in defaults, and check its names.

    Experiments, tables, figures and comparisons that an overlay has set to null are taken out, and
    experiments that are not among ``only_experiments``; with them what shows nothing else, and
    figures that no run of their experiment has anything for. ``files`` are those that the config
    is merged of, for the messages.

    Raises:
        ConfigError: names the key and says what is wrong with it.
    """
    gone = {
        section: _removed(config.get(section), lambda entry: entry is None)
        for section in _REMOVABLE
    }
    _refuse_keys_of_other_types(config, files or {})
    for old, new in _RENAMED.items():
        if old in config:
            at = wrong_at([], files, [old])
            raise ConfigError(f"{at}: the key {old!r} is called {new!r} now; rename it.")
    error = best_match(Draft202012Validator(_schema()).iter_errors(config))
    if error:
        raise ConfigError(sentence(error, files or {}))
    _Filling(_schema()).validate(config)
    config["methods"] |= {name: {} for name, spec in config["methods"].items() if spec is None}
    _check_datasets(config["datasets"])
    _leave_out(config, gone["experiments"], gone["tables"])
    _run_on_own_models(config)
    for name in config.setdefault("notebooks", sorted(NOTEBOOKS)):
        grid.check_name(name, NOTEBOOKS, "notebooks", "notebooks")
    for section in ("experiments", "comparisons"):
        for name, spec in config[section].items():
            grid.check_names(config, spec, f"{section}.{name}")
    _check_turns(config)
    for name in config["comparisons"]:
        grid.pairs_of(config, name)
    check_hparams(config)
    check_layers(config)
    _check_needs(config)
    for name, table in config["tables"].items():
        where = f"tables.{name}.experiment"
        grid.check_name(table["experiment"], config["experiments"], "experiments", where)
    for name, figure in config["figures"].items():
        _check_figure(config, f"figures.{name}", figure)
    # One of paths where no editor reads them, or of times where none edits.
    _removed(
        config["figures"],
        lambda figure: "tables" not in figure and not grid.figure_runs(config, figure),
    )
    for role, method in config["page"].items():
        grid.check_name(method, config["methods"], "methods", f"page.{role}")


def _removed(entries: Any, unwanted: Callable[[Any], bool]) -> set[str]:
    """Take entries out of a section, if it is one; return their names."""
    if not isinstance(entries, dict):
        return set()
    names = {name for name, entry in entries.items() if unwanted(entry)}
    for name in names:
        del entries[name]
    return names


def _leave_out(config: dict[str, Any], experiments: set[str], tables: set[str]) -> None:
    """Take out what shows nothing but ``experiments`` and ``tables`` that were taken out.

    With ``only_experiments`` all others count as such.
    """
    there, only = config["experiments"], config.get("only_experiments")
    if only is not None:
        for name in only:
            grid.check_name(name, there.keys() | experiments, "experiments", "only_experiments")
        experiments = experiments | there.keys() - set(only)
        config["experiments"] = {name: spec for name, spec in there.items() if name in only}
    tables |= _removed(config["tables"], lambda table: table["experiment"] in experiments)
    for figure in config["figures"].values():
        for key, gone in (("experiments", experiments), ("tables", tables)):
            if key in figure:
                figure[key] = [name for name in figure[key] if name not in gone]
    _removed(
        config["figures"],
        lambda figure: (
            figure.get("experiment") in experiments
            or [] in (figure.get("experiments"), figure.get("tables"))
        ),
    )


def _check_datasets(datasets: dict[str, Any]) -> None:
    """Refuse ranges that end before they start, and data sets that cannot be left out."""
    for name, dataset in datasets.items():
        for segment in dataset.get("segments", []):
            if segment[0] >= segment[1]:
                where = f"datasets.{name}.segments"
                raise ConfigError(f"{wrong_at([where])}: {segment} ends before it starts.")
        for other in dataset["leave_out"]:
            where, whole = f"datasets.{name}.leave_out", other.removesuffix(grid.DEVELOPMENT)
            grid.check_name(whole, datasets, "datasets", where)
            if datasets[whole]["leave_out"]:
                raise ConfigError(
                    f"{wrong_at([where])}: {whole!r} itself leaves records out; name what it "
                    "leaves out here, and data sets that leave out nothing."
                )


def _check_turns(config: dict[str, Any]) -> None:
    """Refuse turns of a pipeline that has none."""
    specs = {f"experiments.{name}": spec for name, spec in config["experiments"].items()}
    for name, comparison in config["comparisons"].items():
        for pair, sides in comparison["pairs"].items():
            specs |= {f"comparisons.{name}.pairs.{pair}.{side}": sides[side] for side in "ab"}
    for where, spec in specs.items():
        if spec.get("turn", 1) > 1 and spec["mode"] != "consecutive":
            raise ConfigError(
                f"{where}.turn groups consecutive edits, but its mode is {spec['mode']!r}; set "
                "mode: consecutive, or take turn out."
            )


def _check_needs(config: dict[str, Any]) -> None:
    """Refuse a run that reads a stage which no rule makes, or which cannot be trained.

    Nor may names of log files be too long: a log is called by all of a job's wildcards.
    """
    for run in grid.all_runs(config):
        editor = grid.editor_of(config, run.method)
        check_length(".".join([*PurePosixPath(run.folder()).parts[1:], "log"]), editor)
        for need in grid.needs_of(config, run):
            parts = PurePosixPath(need.path(run.model, run.dataset)).with_suffix(".log").parts
            check_length(".".join(parts[1:]), editor)
            reads = f"methods.{run.method}: its editor reads {need.asset!r}"
            if need.rule not in RULES:
                raise ConfigError(
                    f"{reads}, made by a rule {need.rule!r}, which the workflow does not have; "
                    f"{nearest(need.rule, RULES)}"
                )
            _check_split(config, run.dataset.removesuffix(grid.DEVELOPMENT), need, reads)


def _check_split(config: dict[str, Any], dataset: str, need: Need, reads: str) -> None:
    """Refuse a stage of a split that has not enough records."""
    spec = config["datasets"][dataset]
    if isinstance(need, Trained | Development) and not spec["development"]:
        raise ConfigError(
            f"{reads}, made of the development split of {dataset!r}, which has none; "
            f"set datasets.{dataset}.development, to 100 say."
        )
    if isinstance(need, Hypernetwork) and spec["training"] < (least := need.records):
        raise ConfigError(
            f"{reads}, trained on {least} records a step of the training split of {dataset!r}, "
            f"which has {spec['training']}; set datasets.{dataset}.training to {least} or more, or "
            "lower edits or groups."
        )


def _run_on_own_models(config: dict[str, Any]) -> None:
    """Let every experiment and comparison run on ``only_models``, instead of those it names."""
    if "only_models" not in config:
        return
    for name in config["only_models"]:
        grid.check_name(name, config["models"], "models", "only_models")
    for section in ("experiments", "comparisons"):
        for spec in config[section].values():
            spec["models"] = list(config["only_models"])


def _check_figure(config: dict[str, Any], where: str, figure: dict[str, Any]) -> None:
    """Refuse a figure of something that is not there, or that would show nothing."""
    for table in figure.get("tables", []):
        grid.check_name(table, config["tables"], "tables", f"{where}.tables")
        if figure["kind"] == "sizes":
            _check_sizes(config, where, figure["method"], config["tables"][table]["experiment"])
    names = config["experiments"]
    for experiment in figure.get("experiments", []):
        grid.check_name(experiment, names, "experiments", f"{where}.experiments")
    if "experiment" not in figure:
        return
    grid.check_name(figure["experiment"], names, "experiments", f"{where}.experiment")
    experiment = names[figure["experiment"]]
    if figure["kind"] == "sweep":
        swept = ["seed", *experiment.get("sweep", {})]
        grid.check_name(figure["parameter"], swept, "the sweep", f"{where}.parameter")
    if figure["kind"] == "edits" and experiment["mode"] != "consecutive":
        raise ConfigError(
            f"{where} shows metrics along consecutive edits, but the experiment "
            f"{figure['experiment']!r} edits in mode {experiment['mode']!r}."
        )


def _check_sizes(config: dict[str, Any], where: str, method: str, experiment: str) -> None:
    """Refuse a figure of sizes whose editor is not run, or that does not know a model's size."""
    spec = config["experiments"][experiment]
    grid.check_name(method, spec["methods"], f"experiments.{experiment}", f"{where}.method")
    for model in spec["models"]:
        if "parameters" not in config["models"][model].get("shape", {}):
            raise ConfigError(
                f"{where} shows models by size: give models.{model}.shape.parameters."
            )


def _refuse_keys_of_other_types(node: Any, files: Files, where: tuple[str | int, ...] = ()) -> None:
    """Refuse a key that YAML reads as something else than a text (1, yes, null, a date)."""
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str):
                at = wrong_at(where, files, [*where, key])
                raise ConfigError(f"{at}: the key {key!r} is no text; quote it.")
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(child, dict | list):
            _refuse_keys_of_other_types(child, files, (*where, key))
