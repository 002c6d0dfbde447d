"""What a config does that its reader may not expect, in sentences. Imports no torch."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kmebench.editors.needs import few_tokens
from kmebench.io.origins import mirror_file
from kmebench.planning import grid
from kmebench.values import DEVELOPMENT


def warnings_of(config: Mapping[str, Any]) -> list[str]:
    """Return what is to be told once, before anything runs."""
    return [*_untuned(config), *_few_tokens(config)]


def absent(config: Mapping[str, Any]) -> list[str]:
    """Return what a new run would miss, and one that has its data and models would not."""
    return [*_absent_models(config), *_absent_data(config)]


def mirror_of(config: Mapping[str, Any]) -> str:
    """Return the folder that data files are looked for in first; empty without one."""
    return str(config["data_mirror"] or os.environ.get("KMEBENCH_DATA_MIRROR", ""))


def _absent_models(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each model that runs and whose folder or file is not there."""
    for model in dict.fromkeys(run.model for run in grid.all_runs(config)):
        path = config["models"][model]["source"].get("path")
        if path and not Path(path).expanduser().exists():
            yield f"{model}: {path} does not exist; correct models.{model}.source.path."


def _absent_data(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each data set that is used and can neither be found nor downloaded."""
    mirror = mirror_of(config)
    used = dict.fromkeys(run.dataset for run in grid.all_runs(config))
    for dataset in dict.fromkeys(name.removesuffix(DEVELOPMENT) for name in used):
        source = config["datasets"][dataset]["source"]
        names = source.get("filenames")
        if names and "url" not in source and not (mirror and mirror_file(names, mirror)):
            place = f"it is not in the folder {mirror}" if mirror else "no mirror folder is set"
            yield (
                f"{dataset}: {names[0]} has no URL, and {place}; set data_mirror or "
                "KMEBENCH_DATA_MIRROR to the folder that holds it."
            )


def _untuned(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each model that methods run on with values chosen for none."""
    untuned: dict[str, list[str]] = {}
    for run in grid.all_runs(config):
        methods = untuned.setdefault(run.model, [])
        if run.method not in methods and _is_untuned(config, run):
            methods.append(run.method)
    for model, methods in untuned.items():
        if methods:
            verb = "runs" if len(methods) == 1 else "run"
            yield (
                f"{model}: {', '.join(methods)} {verb} untuned, with defaults alone; copy "
                f"what a search of this model chooses to config/tuned/, or set "
                f"models.{model}.hparams."
            )


def _is_untuned(config: Mapping[str, Any], run: grid.Run) -> bool:
    """Whether nothing sets a value for this model: a search, merged from its file, or the user.

    Runs of a search are on the development split.
    """
    if run.dataset.endswith(DEVELOPMENT) or not grid.card_of_method(config, run.method).names:
        return False
    sections = grid.hparams_sections(config, run.model, run.method, run.pipeline)
    return not any(values for place, values in sections if place[0] == "models")


def _few_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each model whose covariance is of few tokens, if its M is known."""
    tokens = config["covariance"]["tokens"]
    for model, spec in config["models"].items():
        if "shape" in spec and grid.measured_layers(config, model):
            few = few_tokens(tokens, spec["shape"]["ffn_width"])
            if few:
                yield f"{model}: {few}"
