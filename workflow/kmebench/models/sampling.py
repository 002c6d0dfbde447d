"""Texts that a model writes itself, by plain sampling."""

import torch
from torch import Tensor

from kmebench.models.editable import EditableModel
from kmebench.models.encoding import put_before


@torch.no_grad()
def sample(model: EditableModel, rows: int, length: int, seed: int) -> Tensor:
    """Sample texts at temperature 1; return token ids [rows, length], on the CPU.

    Random numbers are drawn on the CPU, and a token is the first whose cumulated probability
    passes its number: torch.multinomial is twenty times slower on the CPU, and on CUDA a
    cumulated sum is not deterministic.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(beginning(model)[:length]).expand(rows, -1)
    written, cache = ids, None
    while True:
        output = model.model.base_model(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=True
        )
        if written.shape[1] == length:
            return written
        cache = output.past_key_values
        logits = model.head(output.last_hidden_state[:, -1])
        cumulated = logits.to("cpu", torch.float32).softmax(dim=-1).cumsum(dim=-1)
        # Below the last sum, not below 1: rounding must not lead past the vocabulary.
        drawn = torch.rand(rows, 1, generator=generator) * cumulated[:, -1:]
        ids = torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[1] - 1)
        written = torch.cat([written, ids], dim=1)


def beginning(model: EditableModel) -> list[int]:
    """Return the tokens a text begins with: what the tokenizer puts there, else BOS, else EOS."""
    tokenizer = model.tokenizer
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return put_before(tokenizer) or [next(c for c in candidates if c is not None)]
