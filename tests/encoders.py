"""A random sentence encoder of the form of the real one."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase


def write_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write one, of matrices so large that texts differ."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
