"""Contexts: sampled from the model, by top-k, without touching anything else."""

import pytest
import torch

from kmebench.editors.contexts import (
    MEMIT_LENGTHS,
    ROME_LENGTHS,
    STARTS,
    contexts_from_state,
    contexts_state,
    prefixes,
    sample_contexts,
)
from kmebench.models.encoding import SubjectText
from tests.conftest import FAMILIES


def test_the_bare_prompt_is_the_first_group_and_texts_begin_with_the_starts_in_turn(make_model):
    model = make_model("llama")
    bare, *groups = sample_contexts(model, ROME_LENGTHS, seed=0)
    assert bare == ("{}",)
    assert [len(group) for group in groups] == [10, 10]
    for group in groups:
        for i, template in enumerate(group):
            assert template.startswith(STARTS[i % 5])
            assert template.endswith(". {}")
    assert [len(g) for g in sample_contexts(model, MEMIT_LENGTHS, seed=0)] == [1, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_sampled_one_by_one_from_the_five_best_tokens(family, make_model, monkeypatch):
    """Against a loop over single texts; the draws of a batch are those of its rows in order."""
    model = make_model(family)
    spoken = []
    decode = model.tokenizer.decode
    monkeypatch.setattr(
        model.tokenizer,
        "decode",
        lambda ids, **kw: (spoken.append(list(ids)), decode(ids, **kw))[1],
    )
    sample_contexts(model, ((6, 7),), seed=3)
    monkeypatch.undo()
    rows = [model.tokenizer(STARTS[i % 5])["input_ids"] for i in range(7)]
    sizes = [max(6, len(row)) for row in rows]
    assert len({len(row) for row in rows}) > 1  # first words of one token and of several
    generator = torch.Generator().manual_seed(3)
    while short := [row for row in rows if len(row) < 6]:
        logits = [model.model(torch.tensor([row])).logits[0, -1] for row in short]
        best = torch.stack(logits).sort(descending=True)
        chances = best.values[:, :5].exp() / best.values[:, :5].exp().sum(dim=1, keepdim=True)
        draws = torch.multinomial(chances, 1, generator=generator)
        for row, ranked, draw in zip(short, best.indices.tolist(), draws.tolist(), strict=True):
            row.append(ranked[draw[0]])
    assert spoken == rows
    assert [len(row) for row in rows] == sizes  # the first word counts, as released


def test_the_seed_decides_and_the_global_generator_does_not(make_model):
    model = make_model("gptj")
    torch.manual_seed(1)
    once = sample_contexts(model, MEMIT_LENGTHS, seed=5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert after == torch.rand(1)
    assert once == sample_contexts(model, MEMIT_LENGTHS, seed=5)
    assert once != sample_contexts(model, MEMIT_LENGTHS, seed=6)


def test_special_tokens_are_not_spoken(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.parameter("model.embed_tokens.weight")[0] *= 50  # the end token, always among five
    contexts = sample_contexts(model, ((6, 20),), seed=0)
    assert not any("endoftext" in template for template in contexts[1])


def test_prefixes_keep_braces_of_the_text():
    contexts = (("{}",), ("The {} of {x}. {}", "I {. {}"))
    assert prefixes(contexts) == ["", "The {} of {x}. ", "I {. "]


def test_the_slot_after_a_context_with_braces_is_the_prompts(make_model):
    model = make_model("llama")
    before = prefixes((("{}",), ("The {} of Japan. {}",)))
    for prefix in before:
        item = model.encode_subjects([SubjectText(prefix, "In {}", "Italy", None)])[0]
        assert model.tokenizer.decode(item.ids) == f"{prefix}In Italy"
        assert item.subject_last == len(item.ids) - 1


@pytest.mark.parametrize("contexts", [(), (("I. {}",),), (("{}", "I."),)])
def test_contexts_without_the_bare_prompt_first_or_without_slot_are_refused(contexts):
    with pytest.raises(ValueError, match="must begin with"):
        prefixes(contexts)


def test_contexts_survive_the_state_of_an_editor():
    contexts = (("{}",), ('Thé "{x}"\n\u2028 {. {}', "\ufffd 日本. {}"), ("I. {}",))
    state = contexts_state(contexts)
    assert all(t.dtype == torch.uint8 for t in state.values())
    assert contexts_from_state(state | {"else": torch.zeros(3)}) == contexts
    assert contexts_from_state({}) is None
