"""The Python interface: load a model, edit facts, look, save. See docs/python.md.

All of it is there as ``kmebench.load`` and so on, and imports torch when it is first used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Result, build_editor
from kmebench.editors.locate.covariance.factors import cache_factor
from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.store import Covariances, check_covariance
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.editors.needs import Covariance, Inverse, NeutralMetric, Spectrum
from kmebench.editors.pac.neutral import write_metric
from kmebench.edits.edit import Edit
from kmebench.errors import ConfigError, KMEBenchError, ModelError
from kmebench.io import origins
from kmebench.io.checked_files import users_own
from kmebench.io.logs import doing
from kmebench.models.editable import SPREAD, EditableModel, pick_device, seed_everything
from kmebench.models.gguf import from_gguf
from kmebench.models.sources import from_hub, save_model
from kmebench.pipelines.one_fact import (
    check_editable,
    edit_facts,
    likeliest,
    next_token,
    says,
)
from kmebench.planning.by_hand import (
    Kind,
    MadeByHand,
    MadeByWorkflow,
    Source,
    fact,
    find_model,
    method_of,
    workflow_path,
)
from kmebench.planning.workflow import make

__all__ = [
    "Edit",
    "EditRequest",
    "KMEBenchError",
    "Model",
    "Result",
    "edit",
    "editor",
    "fact",
    "likeliest",
    "load",
    "next_token",
    "save",
    "says",
]


class Model(EditableModel):
    """A model that knows where it comes from; without a folder its covariance is to be given."""

    source = Source("", Kind.FOLDER)
    folder: Path | None = None


def load(
    name: str | Path,
    configfiles: Sequence[str | Path] = (),
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Model:
    """Load a model and ask torch for deterministic kernels.

    ``name`` is a Hugging Face folder, a .gguf file (dequantised once, to the cache), a model of
    the config (the workflow makes it) or an id of the hub. Without a ``revision`` the hub gives
    what is newest, which may be another model tomorrow. ``configfiles`` are merged over
    config.yaml. ``dtype`` is the config's, else float32; ``device`` as in
    :meth:`EditableModel.load`.

    Raises:
        KMEBenchError: there is no such model, or it cannot be loaded; says why.
    """
    found = find_model(name, configfiles, revision=revision, dtype=dtype, device=device)
    return load_found(found)


def load_found(source: Source) -> Model:
    """Load a model that :func:`find_model` has found; see :func:`load`."""
    if source.device not in SPREAD:
        pick_device(source.device)  # fail before a model is made
    seed_everything(source.seed)
    folder = _folder(source)
    with doing(f"loading {source.name}"):
        model = Model.load(folder, dtype=source.dtype, device=source.device)
    model.source, model.folder = source, folder
    return model


def editor(
    model: Model,
    method: str,
    /,
    *,
    mode: str = "consecutive",
    covariance: str | Path | None = None,
    **hparams: Any,
) -> Editor:
    """Build an editor for one model; see :func:`edit`.

    ``mode`` names the pipeline whose values are taken from the config.
    """
    _check_model(model)
    if not isinstance(method, str):
        raise ConfigError(f"A method is a name; not {method!r}.")
    chosen = method_of(model.source, method, hparams, mode)
    layers = sorted(layer for need in chosen.needs for layer in need.covariance_layers)
    files = {need.key: _file(model, need, layers, covariance) for need in chosen.needs}
    return build_editor(chosen.editor, chosen.hparams, files)


def edit(
    model: Model,
    method: str | Editor,
    facts: Sequence[EditRequest],
    /,
    *,
    covariance: str | Path | None = None,
    **hparams: Any,
) -> Result:
    """Edit one fact, or several together as one batch; the model keeps the edit.

    ``method`` is a method of the config, an editor's name, ``package.module:CARD``, or an
    :func:`editor`, which remembers its earlier edits. ``hparams`` are the editor's values under
    their config names. One fact is edited with the config's values for consecutive editing,
    several with those for batches. A covariance that an editor needs is read from the file
    ``covariance``, else from the workflow's, else measured once and cached.

    Raises:
        KMEBenchError: there is no such method or value, or the edit cannot be made; says why.
    """
    _check_model(model)
    if not isinstance(facts, Sequence) or not all(isinstance(f, EditRequest) for f in facts):
        raise ConfigError("Give the facts as a list of what kmebench.fact returns.")
    if not facts:
        raise ConfigError("There is no fact to edit; give one or more, as a list.")
    if not isinstance(method, str | Editor):
        raise ConfigError(f"A method is a name, or an editor that is built; not {method!r}.")
    if isinstance(method, str):
        mode = "consecutive" if len(facts) == 1 else "batch"
        method = editor(model, method, mode=mode, covariance=covariance, **hparams)
    elif hparams or covariance:
        raise ConfigError("An editor has its values already; give them where it is built.")
    else:
        covariance = method.assets.get(Covariance.asset)
    seed_everything(model.source.seed)
    with users_own(covariance):  # perhaps the user's: never set aside
        return edit_facts(model, method, facts)


def save(model: EditableModel, folder: str | Path) -> None:
    """Write the edited model as a Hugging Face folder, which plain transformers loads.

    Raises:
        ModelError: there is such a folder, or the edits are not of weights alone.
    """
    check_editable(model)
    if not isinstance(folder, str | Path):
        raise ConfigError(f"A folder is a path; not {folder!r}.")
    if Path(folder).exists():
        raise ModelError(f"{folder} exists already; name another folder, or delete it.")
    check_weights_alone(model.edits.total())
    save_model(model.model, model.tokenizer, Path(folder))


def check_weights_alone(edit: Edit) -> None:
    """Refuse an edit that a folder of weights cannot carry.

    Raises:
        ModelError: names its overlays.
    """
    if edit.overlays:
        raise ModelError(
            f"The overlays {', '.join(edit.overlays)} are no weights, so no folder of a model can "
            "hold them; save the edit itself and apply it in Python (docs/python.md)."
        )


def _check_model(model: Any) -> None:
    """Refuse what does not know where it comes from."""
    if not isinstance(model, Model):
        raise ConfigError(
            "A model to edit is what kmebench.load returns, or a kmebench.Model, not a "
            f"{type(model).__name__}."
        )


# -- files ----------------------------------------------------------------------------------


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kmebench"


def _folder(source: Source) -> Path:
    """Return the folder of a model; what is no folder yet becomes one, once."""
    if source.kind is Kind.FOLDER:
        return Path(source.name)
    if source.kind is Kind.HUB:
        return from_hub(source.name, source.revision)
    if source.kind is Kind.CONFIG:
        folder = source.results / "models" / source.name
        make(folder, source.configfiles)
        return folder
    file = Path(source.name)
    folder = _cache() / "models" / f"{file.stem}-{origins.digest(file)[:16]}"
    if not folder.is_dir():
        with doing(f"reading {file} (once)"):
            from_gguf(file, folder)
    return folder


def _file(
    model: Model, need: MadeByHand, layers: Sequence[int], covariance: str | Path | None
) -> Path:
    """Return the file of what an editor needs; it is made if it is not there.

    ``layers`` are those whose covariance all needs of the editor are about.
    """
    if isinstance(need, MadeByWorkflow):
        path = workflow_path(model.source, need)
        make(path, model.source.configfiles)
        return path
    if isinstance(need, NeutralMetric):
        return _metric(model, need)
    if covariance is not None:
        check_covariance(covariance)
    given = Path(covariance) if covariance else _covariance(model, tuple(layers))
    return given if isinstance(need, Covariance) else _factor(model, need, given)


def _factor(model: Model, need: Inverse | Spectrum, covariance: Path) -> Path:
    """Return the file of what is computed of C of a layer: the workflow's, or one in the cache."""
    done = model.source.results / need.path(model.source.name, "")
    if covariance == _workflows(model) and done.is_file():
        return done
    name = hashlib.sha256(origins.digest(covariance).encode()).hexdigest()[:16]
    path = _cache() / need.path(name, "")
    if not path.is_file():
        what = f"computing the {need.asset} of the covariance of layer {need.layer} (once)"
        with doing(what), users_own(covariance):
            cache_factor(path, covariance, need.factor, need.layer, str(model.device))
    return path


def _metric(model: Model, need: NeutralMetric) -> Path:
    """Return the file of the neutral metric: the workflow's, or one in the cache, made once."""
    done = model.source.results / need.path(model.source.name, "")
    if model.source.kind is Kind.CONFIG and done.is_file():
        return done
    path = _cache() / need.path(_identity(model, "the neutral metric", "load it so"), "")
    if not path.is_file():
        with doing("measuring the neutral metric (once)"), model.edits.savepoint():
            model.revert()
            write_metric(path, model, need)
    return path


def _identity(model: Model, what: str, mend: str, *settings: Any) -> str:
    """Name what is measured of the weights of a model.

    Raises:
        ConfigError: nobody knows where they come from.
    """
    if model.folder is None:
        raise ConfigError(
            f"This editor needs {what}, and the model was not loaded by kmebench.load; {mend}."
        )
    identity = [origins.digest(model.folder), model.source.dtype, *settings]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _covariance(model: Model, layers: tuple[int, ...]) -> Path:
    """Return the workflow's covariance, if it holds the layers, else that of the cache."""
    path = _workflows(model)
    held = Covariances.open(path).layers if path and path.is_file() else ()
    return path if path and set(layers) <= set(held) else _measured_covariance(model, layers)


def _workflows(model: Model) -> Path | None:
    """Return where the workflow's covariance lies, for a model of the config."""
    if model.source.kind is not Kind.CONFIG:
        return None
    return model.source.results / Covariance(()).path(model.source.name, "")


def _measured_covariance(model: Model, layers: tuple[int, ...]) -> Path:
    """Return the cached file of these layers of this model, measured if it is not there."""
    settings = dict(model.source.config.get("covariance", {}))
    force = settings.pop("force", False)
    what, mend = "a covariance", "give the file of one (covariance=...)"
    name = _identity(model, what, mend, layers, settings)
    path = _cache() / "covariance" / f"{name}.safetensors"
    if not path.is_file():
        with model.edits.savepoint():
            model.revert()
            measure_covariance(path, model, layers, TextSettings(**settings), force=force)
    return path
