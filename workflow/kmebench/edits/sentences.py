"""Sentence embeddings: what tells whether a question is about a fact.

The encoder is a folder of its own, apart from the model that is edited (all-MiniLM-L6-v2, by the
config). It runs on the CPU in float32, so that memories are the same wherever the model lies.
A file of fine-tuned weights may go before those of the folder.
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
from kmebench.io.tensors import TensorFile

#: Tokens of a text that are read, and texts in one pass.
LENGTH, BATCH = 256, 64
#: Format of fine-tuned weights; the fact ``encoder`` is the SHA-256 of the weights before.
TUNED = "kmebench.tuned_encoder.v1"


def embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return embeddings of norm 1, [n, D], with gradients: the mean of the last states."""
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    states = model(**tokens).last_hidden_state  # [n, T, D]
    attended = tokens["attention_mask"][..., None].to(states)
    return normalize((states * attended).sum(dim=1) / attended.sum(dim=1), dim=1)


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder of the Hugging Face form; loaded when the first text is embedded."""

    folder: str
    sha256: str  # of its weights; of the tuned ones, where there are any
    tuned: str = ""  # file of weights that go before the folder's

    @classmethod
    def open(cls, folder: str | Path, tuned: str | Path = "") -> Self:
        """Name the encoder in a folder, perhaps with weights that were fine-tuned.

        Raises:
            ModelError: the folder holds no encoder in safetensors.
        """
        return cls(str(folder), _checksum(folder, tuned), str(tuned))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of norm 1, float32 [n, D]: the mean of the last states.

        Raises:
            ModelError: the encoder is not there any more, or is another one.
        """
        if not texts:
            return torch.empty(0, self.loaded[0].config.hidden_size)
        different = sorted(set(texts), key=lambda text: (len(text), text))
        chunks = [different[i : i + BATCH] for i in range(0, len(different), BATCH)]
        rows = {
            text: row
            for chunk in chunks
            for text, row in zip(chunk, embeddings(*self.loaded, chunk), strict=True)
        }
        return torch.stack([rows[text] for text in texts])

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The encoder, in float32, and its tokenizer."""
        found = _checksum(self.folder, self.tuned)
        if found != self.sha256:
            raise ModelError(
                f"The sentence encoder in {self.tuned or self.folder} has weights of the sha256 "
                f"{found}, and the edit was made with {self.sha256}; put that encoder there."
            )
        transformers_logging.disable_progress_bar()
        model = AutoModel.from_pretrained(
            self.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        if self.tuned:
            model.load_state_dict(self._tuned_weights(), strict=False)
        return model.eval(), AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def _tuned_weights(self) -> dict[str, Tensor]:
        file = TensorFile.open(self.tuned, TUNED)
        if file.facts["encoder"] != (found := _checksum(self.folder)):
            raise ModelError(
                f"{self.tuned} holds weights tuned from an encoder of the sha256 "
                f"{file.facts['encoder']}, and {self.folder} has {found}; put that encoder there, "
                "or delete the file and run the workflow again."
            )
        return {name: file.tensor(name) for name in file.digests}


def _checksum(folder: str | Path, tuned: str | Path = "") -> str:
    weights = Path(tuned or Path(folder) / "model.safetensors")
    if not weights.is_file():
        raise ModelError(
            f"{weights.parent} holds no sentence encoder: it has no {weights.name}; run the "
            "workflow, which makes it."
        )
    return sha256_of(weights)
