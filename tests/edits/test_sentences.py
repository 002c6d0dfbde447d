"""The sentence encoder: the mean of the last states of one text at a time is the oracle."""

import shutil

import pytest
import torch
from transformers import BertModel, PreTrainedTokenizerFast

from kmebench.edits import sentences
from kmebench.edits.sentences import SentenceEncoder
from kmebench.errors import ModelError

TEXTS = ["The capital of France is", "Mount Fuji", "Japan", "What language is spoken in Japan?"]


def test_an_embedding_is_the_mean_of_the_last_states(encoder_folder, monkeypatch):
    monkeypatch.setattr(sentences, "BATCH", 3)
    model = BertModel.from_pretrained(encoder_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    found = SentenceEncoder.open(encoder_folder).embed([*TEXTS, TEXTS[0]])
    for text, row in zip([*TEXTS, TEXTS[0]], found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


def test_no_text_has_no_embedding(encoder_folder):
    assert SentenceEncoder.open(encoder_folder).embed([]).shape == (0, 16)


def test_a_long_text_is_cut(encoder_folder, monkeypatch):
    monkeypatch.setattr(sentences, "LENGTH", 3)
    encoder = SentenceEncoder.open(encoder_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    begin = tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][:3])
    assert torch.equal(encoder.embed([TEXTS[0]]), encoder.embed([begin]))


def test_another_encoder_in_its_place_is_refused(encoder_folder, tmp_path):
    folder = tmp_path / "encoder"
    with pytest.raises(ModelError, match=r"holds no sentence encoder: it has no model.safetensors"):
        SentenceEncoder.open(folder)
    shutil.copytree(encoder_folder, folder)
    encoder = SentenceEncoder.open(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"was made with .*; put that encoder there"):
        encoder.embed(TEXTS)
