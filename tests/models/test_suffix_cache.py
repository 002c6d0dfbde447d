"""Replays and logits against full forward passes of transformers, one text at a time."""

import copy

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from kmebench.models.early_exit import layer_calls
from kmebench.models.encoding import SubjectText
from kmebench.models.suffix_cache import Replay
from tests.conftest import FAMILIES, WINDOW

EVERY = {family: {} for family in (*FAMILIES, "mistral", "qwen2")} | {
    "sequential": {"family": "gpt_neox", "use_parallel_residual": False},
    "deep": {"family": "gptj", "layers": 6},
}
BEFORE = ("", "The Seine flows through Paris. ", "What language is spoken? ")


def build(make_model, name):
    return make_model(**{"family": name} | EVERY[name])


def plain(model):
    """The same model as transformers builds it, with nothing of ours in it."""
    again = AutoModelForCausalLM.from_config(model.model.config).double().eval()
    again.load_state_dict(model.model.state_dict())
    return again.requires_grad_(False)


@pytest.fixture
def texts(requests):
    return [SubjectText(b, r.prompt, r.subject, r.target_new) for b in BEFORE for r in requests]


@pytest.mark.parametrize("name", EVERY)
def test_a_replay_gives_the_logits_of_full_passes(name, make_model, texts):
    """From every layer, of texts longer than the window, all together and of some."""
    model = build(make_model, name)
    theirs, encoded = plain(model), model.encode_subjects(texts)
    assert min(len(e.ids) for e in encoded) > WINDOW
    full = [theirs(torch.tensor([e.ids])).logits[0, e.subject_last : -1] for e in encoded]
    for start in range(model.n_layers + 1):
        replay = Replay.of(model, encoded, start)
        some = torch.tensor([5, 0, 7])
        for one, rows in ((replay, range(len(encoded))), (replay.select(some), some.tolist())):
            logits = model.head(one.run(one.states))
            for row, text in enumerate(rows):
                got = logits[row, : len(full[text])]
                torch.testing.assert_close(got, full[text], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_a_window_matters_where_there_is_one(name, make_model, texts):
    """Of the replay whose masks are all causal only the logits of models without one are right."""
    model = build(make_model, name)
    theirs, encoded = plain(model), model.encode_subjects(texts[-1:])
    full = theirs(torch.tensor([encoded[0].ids])).logits[0, encoded[0].subject_last : -1]
    windows, model.windows = model.windows, [None] * model.n_layers
    replay = Replay.of(model, encoded, 0)
    same = torch.allclose(model.head(replay.run(replay.states))[0], full)
    assert same == (set(windows) == {None})


def test_recording_what_layers_are_handed_leaves_the_model_alone(make_model):
    model = make_model("gemma3_text")
    before = [dict(vars(layer)) for layer in model.layers]
    calls = layer_calls(model, input_ids=torch.tensor([[1, 2, 3]]))
    assert [call.layer for call in calls] == model.layers
    assert [dict(vars(layer)) for layer in model.layers] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    rotary = [call.kwargs["position_embeddings"][0] for call in calls]
    assert torch.equal(rotary[0], rotary[2])
    assert not torch.equal(rotary[0], rotary[1])


@pytest.mark.parametrize("name", EVERY)
def test_answer_logits_are_those_of_transformers(name, make_model, requests):
    model = build(make_model, name)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    got = model.answer_logits(model.collate(encoded))
    theirs = plain(model)
    every = [theirs(torch.tensor([e.ids])).logits[0, -e.n_target - 1 : -1] for e in encoded]
    torch.testing.assert_close(got, torch.cat(every), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_decoding_of_padded_prompts_is_greedy_decoding_one_by_one(name, make_model, requests):
    """Prompts of many lengths, padded on the left, against whole passes without a cache."""
    model = build(make_model, name)
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.eos_token_id = None  # so that no row ends
    prompts = model.encode_prompts([b + r.filled_prompt for b in BEFORE for r in requests])
    said = model.generate(prompts, 6)
    theirs = plain(model)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(6):
            text.append(int(theirs(torch.tensor([text])).logits[0, -1].argmax()))
        assert said[row].tolist() == text[len(prompt) :]
