"""Small random models of every supported family, requests for them, and the name of a run."""

import gc

gc.disable()  # until all is imported, of which nothing is garbage

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import AutoModelForCausalLM

from kmebench.data.records import EditRequest
from kmebench.models.editable import EditableModel
from kmebench.models.tiny import train_tiny, train_tokenizer
from tests.encoders import write_encoder

# pytest-xdist runs one process on every core; so do the workflows that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


#: Each has something of its own in its layers; Mistral and Qwen2 have nothing that these lack.
FAMILIES = (
    "gptj",
    "llama",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "qwen3",
    "gemma2",
    "gemma3_text",
)
#: Enough for what does not depend on where a family keeps its weights.
SOME_FAMILIES = FAMILIES[::2]


def in_turn(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Every family with one of ``values``: enough where the two do not meet in the code."""
    return list(zip(FAMILIES, itertools.cycle(values), strict=False))


#: The name of a run: the columns of kmebench.evaluation.score.RUN.
RUN = {
    "model": "m",
    "dataset": "d",
    "mode": "consecutive",
    "method": "pac",
    "variant": "default",
    "seed": 0,
}

TEXTS = [
    "The capital of France is Paris.",
    "The capital of Italy is Rome.",
    "What language is spoken in Japan? Japanese.",
    "Mount Fuji stands in Japan, and the Seine flows through Paris.",
]


#: Of attention, shorter than most texts, in the layers that have one.
WINDOW = 4


def small_config(
    family: str, vocabulary: int, *, layers: int = 3, width: int = 24, **others: Any
) -> PretrainedConfig:
    """Two or three layers, D = 16, M = ``width``."""
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family in ("gptj", "gpt2"):
        common |= {"n_embd": 16, "n_inner": width, "n_layer": layers, "n_head": 2}
        common |= {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        common |= {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
        common |= {"ffn_dim" if family == "opt" else "intermediate_size": width}
        common |= {"max_position_embeddings": 64}
    grouped = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    # The highest layer sees all, so that what is changed below it reaches the end of a text.
    mixed = [("full_attention", "sliding_attention")[(layers - 1 - i) % 2] for i in range(layers)]
    sliding = {"sliding_window": WINDOW, "layer_types": mixed}
    gemma = grouped | sliding | {"head_dim": 8, "query_pre_attn_scalar": 8}
    capped = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}
    own = {
        "gptj": {"rotary_dim": 4},
        "gpt2": {},
        "llama": grouped,
        "mistral": grouped | {"sliding_window": WINDOW},
        "qwen2": grouped | sliding | {"use_sliding_window": True},
        "qwen3": grouped | sliding | {"use_sliding_window": True, "head_dim": 8},
        "phi3": grouped | {"sliding_window": WINDOW},
        "gemma2": gemma | capped,
        "gemma3_text": gemma,
        "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        "opt": {"dropout": 0.0, "word_embed_proj_dim": 16, "activation_function": "gelu"},
    }[family]
    return CONFIG_MAPPING[family](**common | own | others)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS)


class Float64Torch:
    """``torch``, but where a model casts to float32 it stays in float64."""

    def __getattr__(self, name: str):
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture
def make_model(tokenizer, monkeypatch) -> Callable[..., EditableModel]:
    """Build random models; those in float64 compute in float64 throughout.

    transformers casts attention scores of GPT-J and norms of Llama to float32, whose rounding
    (other for other batch shapes and processors) would drown what the tests compare.
    """

    def make(family: str, dtype: torch.dtype = torch.float64, **others: Any) -> EditableModel:
        config, gemma = small_config(family, len(tokenizer), **others), "gemma" in family
        if dtype == torch.float64:
            module = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
            monkeypatch.setattr(module, "torch", Float64Torch())
            if gemma:
                norm = type(AutoModelForCausalLM.from_config(config).model.norm)
                exact = lambda self, x: self._norm(x) * (1.0 + self.weight)  # noqa: E731
                monkeypatch.setattr(norm, "forward", exact)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # So large that everything has influence.
            if gemma or ("norm" not in name and "ln_" not in name):
                torch.nn.init.normal_(parameter, std=0.3)
        return EditableModel(model.to(dtype), tokenizer)

    return make


@pytest.fixture(scope="session")
def requests() -> list[EditRequest]:
    def request(case_id, subject, prompt, new, true, paraphrase, locality):
        return EditRequest(case_id, subject, prompt, new, true, (paraphrase,), (locality,))

    return [
        request(
            "a",
            "France",
            "The capital of {} is",
            "Rome",
            "Paris",
            "The Seine flows through",
            ("The capital of Italy is", "Rome"),
        ),
        request(
            "b",
            "Japan",
            "What language is spoken in {}?",
            "the Paris of Italy",
            "Japanese",
            "In Japan, and the language is",
            ("Mount Fuji stands in", "Japan"),
        ),
        request(
            "c",
            "Italy",
            "The capital of {} is",
            "Fuji",
            "Rome",
            "Paris, and in Italy",
            ("The capital of France is", "Paris"),
        ),
    ]


def without_word(model: EditableModel, word: str) -> EditableModel:
    """Make texts with a word of one token NaN, on a model whose head has weights of its own."""
    (row,) = model.tokenizer(word)["input_ids"]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[row] = torch.nan
    return model


@pytest.fixture(scope="session")
def encoder_folder(tokenizer, tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), tokenizer)


CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Iraq": "Baghdad",
}


@pytest.fixture(scope="session")
def trained() -> EditableModel:
    """A tiny GPT-J that knows ten capitals, trained in a few seconds."""
    forms = ("The capital of {} is", "{} has its capital in", "What is the capital of {}?")
    facts = [(form.replace("{}", c), city) for form in forms for c, city in CAPITALS.items()]
    model, tokenizer, _ = train_tiny(facts, seed=0, max_epochs=60)
    return EditableModel(model, tokenizer)


@pytest.fixture(scope="session")
def capital_requests() -> list[EditRequest]:
    """Every capital replaced by the next country's."""
    cities = list(CAPITALS.values())
    return [
        EditRequest(
            case_id=country,
            subject=country,
            prompt="The capital of {} is",
            target_new=cities[(i + 1) % len(cities)],
            target_true=city,
            paraphrases=(f"{country} has its capital in",),
            locality=((f"The capital of {list(CAPITALS)[(i + 3) % len(cities)]} is", "x"),),
            portability=((f"What is the capital of {country}?", cities[(i + 1) % len(cities)]),),
        )
        for i, (country, city) in enumerate(CAPITALS.items())
    ]
