"""Sentence embeddings: what tells whether a question is about a fact.

The encoder is a folder of its own, apart from the model that is edited (all-MiniLM-L6-v2, by the
config). It runs on the CPU in float32, so that memories are the same wherever the model lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kmebench.errors import ModelError
from kmebench.io.files import sha256_of

#: Tokens of a text that are read, and texts in one pass.
LENGTH, BATCH = 256, 64


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder of the Hugging Face form; loaded when the first text is embedded."""

    folder: str
    sha256: str  # of its weights

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Name the encoder in a folder.

        Raises:
            ModelError: the folder holds no encoder in safetensors.
        """
        return cls(str(folder), _checksum(Path(folder)))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of norm 1, float32 [n, D]: the mean of the last states.

        Raises:
            ModelError: the encoder is not there any more, or is another one.
        """
        if not texts:
            return torch.empty(0, self._loaded[0].config.hidden_size)
        different = sorted(set(texts), key=lambda text: (len(text), text))
        chunks = [different[i : i + BATCH] for i in range(0, len(different), BATCH)]
        rows = {
            text: row
            for chunk in chunks
            for text, row in zip(chunk, self._embedded(chunk), strict=True)
        }
        return torch.stack([rows[text] for text in texts])

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        model, tokenizer = self._loaded
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        states = model(**tokens).last_hidden_state  # [n, T, D]
        attended = tokens["attention_mask"][..., None].to(states)
        return normalize((states * attended).sum(dim=1) / attended.sum(dim=1), dim=1)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        found = _checksum(Path(self.folder))
        if found != self.sha256:
            raise ModelError(
                f"The sentence encoder in {self.folder} has weights of the sha256 {found}, and the "
                f"edit was made with {self.sha256}; put that encoder there."
            )
        transformers_logging.disable_progress_bar()
        model = AutoModel.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True)
        return model.eval(), AutoTokenizer.from_pretrained(self.folder)


def _checksum(folder: Path) -> str:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"{folder} holds no sentence encoder: it has no model.safetensors; run the workflow, "
            "which fetches one."
        )
    return sha256_of(weights)
