"""What a model is loaded from, and what seeding a run switches on."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from kmebench.errors import ModelError
from kmebench.models.editable import EditableModel, seed_everything
from kmebench.models.sources import save_model


@pytest.fixture
def flags():
    """Put back what seeding changes in the whole process."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def folder(make_model, tmp_path):
    """A Llama as a Hugging Face folder."""
    model = make_model("llama", torch.float32)
    save_model(model.model, model.tokenizer, tmp_path / "model")
    return tmp_path / "model"


def add(file, **entries):
    """Put entries into a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": 2 * ["own.Own"]}},
        ),
    ],
)
def test_code_in_a_folder_is_never_run(file, entries, folder, monkeypatch):
    """On a terminal transformers asks whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    add(folder / file, **entries)
    (folder / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="needs code of its own, which is never run"):
        EditableModel.load(folder, device="cpu")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_beside_a_model_is_refused(folder, make_model):
    """transformers would put it into the model, and edits would be lost when it is saved."""
    adapted = get_peft_model(make_model("llama").model, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(folder)
    with pytest.raises(ModelError, match="holds a PEFT adapter: merge it"):
        EditableModel.load(folder, device="cpu")


def test_quantised_weights_are_refused(folder):
    """An edit of codes in 8 bits would be rounded away."""
    add(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="its weights are quantised; take the model"):
        EditableModel.load(folder, device="cpu")


def test_seeding_lets_cublas_be_deterministic(flags, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seed_everything(0)
    # torch 2.6 to 2.9 accept two values and refuse every product on CUDA without one of them.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_everything(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # a user's own


def test_seeding_is_deterministic_and_fills_no_memory(flags):
    seed_everything(3)
    first = torch.rand(5)
    seed_everything(3)
    assert torch.equal(torch.rand(5), first)
    assert torch.are_deterministic_algorithms_enabled()
    with torch.profiler.profile() as profiler:
        torch.empty(4)
    assert "aten::fill_" not in {event.key for event in profiler.key_averages()}


def test_a_generation_hands_the_head_one_matrix(make_model):
    model = make_model("llama")
    seen = []
    head = model.model.get_output_embeddings()
    with head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous())):
        model.generate([(1, 2, 3), (4, 5)], 3)
    assert len(seen) > 1
    assert all(seen)


def test_a_generation_is_greedy_whatever_the_models_own_settings_are(make_model):
    """Qwen's instruct models come with a repetition penalty, others with barred tokens."""
    model = make_model("llama")
    ids = [1, 2, 3]
    for _ in range(12):
        ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    most = ids[3]
    own = GenerationConfig(repetition_penalty=1.5, suppress_tokens=[most], no_repeat_ngram_size=1)
    model.model.generation_config = own
    assert model.generate([(1, 2, 3)], 12)[0].tolist() == ids[3:]
    assert model.model.generation_config is own


@pytest.mark.parametrize("listed", [True, False])
def test_every_end_that_a_model_names_ends_an_answer(make_model, listed):
    """Chat models name the end of a turn beside the end of a text; the tokenizer knows one."""
    model = make_model("llama")
    answer = model.generate([(1, 2, 3)], 6)[0].tolist()
    end = answer[2]
    kept = answer[: answer.index(end) + 1]
    model.model.generation_config = GenerationConfig(eos_token_id=[end, 0] if listed else end)
    ended = model.generate([(1, 2, 3)], 6)[0].tolist()
    assert ended == kept
    assert len(ended) < len(answer)
