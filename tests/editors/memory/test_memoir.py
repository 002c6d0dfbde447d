"""MEMOIR: its training against whole forward passes, its columns, its gate, and what is kept."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.editors.contexts import prefixes
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Passage
from kmebench.edits.sparse_memory import SparseMemory
from kmebench.errors import ConfigError, EditError, KMEBenchError, ModelError
from kmebench.models.sampling import sample
from tests.conftest import SOME_FAMILIES
from tests.editors.memory.asking import logits, memory_of, module_of, pairs
from tests.editors.memory.damage import save_damaged
from tests.pipelines.runs import killed_and_resumed

DOUBLE = torch.float64
HPARAMS = {"layer": 1, "mask_density": 0.25, "threshold": 0.7, "steps": 4, "tolerance": 0.0}
ACTIVE = 6  # of 24


def memoir(**hparams):
    return build_editor("memoir", HPARAMS | hparams, {})


def whole_pass(model, ids, added=None):
    """Logits [T, vocabulary] and W2's input [T, M] of one text; ``added`` (input) goes to W2."""
    seen = []

    def through(_module, inputs, output):
        seen.append(inputs[0][0])
        return output if added is None else output + added(inputs[0])

    with module_of(model).register_forward_hook(through):
        return model.model(torch.tensor([ids])).logits[0], seen[0]


def columns(model, memory, prompt):
    """The columns of a prompt by their definition: π of the largest entries of |f|."""
    (ids,) = model.encode_prompts([prompt])
    with torch.no_grad():
        feature = whole_pass(model, ids)[1].mean(dim=0) - memory.background
    largest = sorted(range(len(feature)), key=lambda j: -abs(float(feature[j])))[:ACTIVE]
    return {int(memory.order[j]) for j in largest}


def literal(model, editor, request, mask, start):
    """Train W_r [D, M] by torch's SGD on all of the matrix, text by text."""
    change = start.clone().requires_grad_()
    sgd = torch.optim.SGD([change], lr=editor.hparams.learning_rate)
    contexts, clipped = prefixes(editor.contexts(model)), 0
    for _ in range(editor.hparams.steps):
        sgd.zero_grad()
        for text in contexts:
            (item,) = model.encode([(text + request.filled_prompt, request.target_new)])
            said, _ = whole_pass(model, item.ids, lambda a: (a * mask) @ change.T)
            n = item.n_target
            loss = cross_entropy(said[-n - 1 : -1], torch.tensor(item.target_ids))
            (loss / len(contexts)).backward()
        norm = change.grad.norm()
        if norm > 1:
            change.grad /= norm + 1e-6  # as torch cuts it
            clipped += 1
        sgd.step()
    return change.detach(), clipped


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_fact_is_written_into_the_columns_of_its_prompt(family, make_model, requests):
    model, editor = make_model(family), memoir()
    weights = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    memory = memory_of(model, editor, requests[:1])
    assert all(torch.equal(weights[n], p) for n, p in model.model.named_parameters())
    model.revert()
    used = columns(model, memory, requests[0].filled_prompt)
    (mask,) = memory.masks
    assert set(mask.nonzero().flatten().tolist()) == used
    assert not memory.change[:, ~mask].any()
    with torch.enable_grad():
        start = torch.zeros_like(memory.change)
        change, clipped = literal(model, editor, requests[0], mask.double(), start)
    assert bool(clipped) == (family in ("gptj", "gpt2", "qwen3"))  # both kinds of steps
    torch.testing.assert_close(memory.change, change, rtol=1e-7, atol=1e-9)


def test_the_background_is_of_short_texts_without_a_beginning(make_model, requests):
    model = make_model("llama")
    memory = memory_of(model, memoir(steps=0), requests[:1])
    written = sample(model, 100, 16, seed=0)[:, 1:]
    with torch.no_grad():
        rows = [whole_pass(model, ids)[1] for ids in written.tolist()]
    torch.testing.assert_close(memory.background, torch.cat(rows).mean(dim=0), rtol=1e-9, atol=0)


def test_a_later_fact_changes_its_own_columns_alone(make_model, requests):
    model, editor = make_model("llama"), memoir()
    torch.manual_seed(1)
    one = memory_of(model, editor, requests[:1])
    two = memory_of(model, editor, requests[1:2])
    again = memory_of(model, editor, requests[1:2])
    assert [len(memory.masks) for memory in (one, two, again)] == [1, 2, 2]
    mask = two.masks[1]
    assert torch.equal(two.change[:, ~mask], one.change[:, ~mask])
    assert not torch.equal(two.change[:, mask], one.change[:, mask])
    assert torch.equal(one.order, two.order)
    assert torch.equal(one.background, two.background)
    model.revert()
    torch.manual_seed(1)
    together = memory_of(model, memoir(), requests[:2])
    assert torch.equal(together.change, two.change)
    assert torch.equal(together.masks, two.masks)


def test_training_ends_where_the_loss_is_small_and_stands_still(make_model, requests):
    model = make_model("llama")
    for tolerance, steps in ((1e9, 1), (0.0, 4)):
        editor = memoir(learning_rate=0.0, tolerance=tolerance)
        editor(model, requests[:1])
        assert editor.steps == steps


# -- the gate --------------------------------------------------------------------------


def hand_made(masks, threshold=0.5, change=None, order=None):
    """A memory of two columns of four for each edit, beside a layer from four numbers to one."""
    masks = torch.tensor(masks, dtype=torch.bool).view(-1, 4)
    change = torch.tensor([change or [1.0, 10.0, 100.0, 1000.0]], dtype=DOUBLE)
    order = torch.tensor(order or [0, 1, 2, 3])
    return SparseMemory("w", threshold, 2, change, masks, order, torch.zeros(4, dtype=DOUBLE))


def routed(memory, inputs, **passage):
    """What a hook makes of outputs 0.5, [R, T], of inputs [R, T, 4]."""
    inputs = torch.tensor(inputs, dtype=DOUBLE)
    output = torch.full((*inputs.shape[:2], 1), 0.5, dtype=DOUBLE)
    return memory.hooks(Passage(**passage))["w"](inputs, output)[..., 0], output


def test_a_row_uses_the_stored_columns_that_it_shares_the_most_with():
    memory = hand_made([[1, 1, 0, 0], [0, 0, 1, 1]])
    rows = [
        [[5.0, -4.0, 1.0, 1.0]],  # its columns are 0 and 1: all of the first edit's
        [[1.0, 2.0, -6.0, 5.0]],  # 2 and 3: all of the second's
        [[4.0, 0.0, 3.0, 2.0]],  # 0 and 2: half of either, which is the threshold
    ]
    new, _ = routed(memory, rows, prompt_last=torch.tensor([0, 0, 0]))
    assert new[:, 0].tolist() == [0.5 + 5 - 40, 0.5 - 600 + 5000, 0.5 + 4]
    new, old = routed(replace(memory, threshold=0.51), rows, prompt_last=torch.tensor([0, 0, 0]))
    assert torch.equal(new[2], old[2, :, 0])


def test_a_permutation_sends_large_entries_to_other_columns():
    memory = hand_made([[0, 0, 1, 1]], threshold=1.0, order=[2, 3, 0, 1])
    new, _ = routed(memory, [[[5.0, -4.0, 1.0, 2.0]]], prompt_last=torch.tensor([0]))
    assert new.tolist() == [[0.5 + 100 + 2000]]


def test_a_closed_gate_returns_what_it_was_given():
    inputs, output = torch.ones(1, 1, 4, dtype=DOUBLE), torch.zeros(1, 1, 1, dtype=DOUBLE)
    inputs[..., :2] = 2
    for memory in (hand_made([]), hand_made([[0, 0, 1, 1]])):
        assert memory.hooks(Passage(torch.tensor([0])))["w"](inputs, output) is output


def test_padding_and_answers_select_nothing_and_a_prefill_decides():
    memory, nan = hand_made([[1, 1, 0, 0], [0, 0, 1, 1]]), [float("nan")] * 4
    here, there = [5.0, 4.0, 1.0, 1.0], [1.0, 1.0, 50.0, 50.0]
    first, last = torch.tensor([1, 0]), torch.tensor([1, 0])
    rows = [[nan, here, there], [here, there, nan]]
    new, _ = routed(memory, rows, prompt_last=last, prompt_first=first)
    assert new[0, 1:].tolist() == [0.5 + 45, 0.5 + 11]
    assert new[1, :2].tolist() == [0.5 + 45, 0.5 + 11]
    passage = Passage(torch.tensor([0]), phase="prefill")
    hook = memory.hooks(passage)["w"]
    output = torch.zeros(1, 1, 1, dtype=DOUBLE)
    hook(torch.tensor([[here]], dtype=DOUBLE), output)
    passage.phase = "decode"
    assert hook(torch.tensor([[there]], dtype=DOUBLE), output).flatten().tolist() == [11.0]


def test_disjoint_facts_do_not_disturb_each_other_by_a_bit():
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 8, generator=generator, dtype=DOUBLE)
    mask = torch.arange(8) < 4
    order, background = torch.arange(8), torch.zeros(8, dtype=DOUBLE)
    masks = torch.stack([mask, ~mask])
    alone = SparseMemory("w", 0.5, 4, both * mask, masks[:1], order, background)
    after = SparseMemory("w", 0.5, 4, both, masks, order, background)
    inputs = torch.randn(1, 3, 8, generator=generator, dtype=DOUBLE) + 5 * mask
    output = torch.zeros(1, 3, 3, dtype=DOUBLE)
    one, two = (m.hooks(Passage(torch.tensor([2])))["w"](inputs, output) for m in (alone, after))
    assert torch.equal(one, two)
    assert one.any()


# -- in a model ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
def test_the_edit_prompt_opens_alone_and_others_keep_their_bits(family, make_model, requests):
    model = make_model(family)
    other = ("Mount Fuji stands in", "Japan")
    before = logits(model, [other, *pairs(requests[:1])])
    memory = memory_of(model, memoir(threshold=1.0), requests[:1])
    assert columns(model, memory, other[0]) != columns(model, memory, requests[0].filled_prompt)
    after = logits(model, [other, *pairs(requests[:1])])
    assert torch.equal(after[0], before[0])
    model.revert()
    (item,) = model.encode(pairs(requests[:1]))
    with torch.no_grad():
        said, _ = whole_pass(model, item.ids, lambda a: (a * memory.masks[0]) @ memory.change.T)
    torch.testing.assert_close(after[1], said[-item.n_target - 1 : -1], rtol=1e-9, atol=1e-10)
    # In company the prompt is padded and has the same columns.
    model.apply(Edit(overlays={"memoir": memory}))
    batch = model.collate(model.encode([other, *pairs(requests[:1]), *pairs(requests[1:])]))
    passage = Passage(batch.prompt_last, batch.rows)
    together = model.answer_logits(batch, passage=passage)
    assert passage.opened.tolist() == [False, True, False, False]
    torch.testing.assert_close(together[batch.rows == 1], after[1], rtol=1e-9, atol=1e-11)
    model.revert()
    closed = batch.rows != 1
    assert torch.equal(model.answer_logits(batch)[closed], together[closed])


def test_saved_and_loaded_the_model_says_the_same(make_model, requests, tmp_path):
    model = make_model("gpt2")
    edit = memoir()(model, requests[:2]).edit
    untouched = logits(model, pairs(requests))
    model.apply(edit)
    after = logits(model, pairs(requests))
    edit.save(tmp_path / "edit.safetensors")
    model.revert()
    assert all(map(torch.equal, logits(model, pairs(requests)), untouched))
    model.apply(Edit.load(tmp_path / "edit.safetensors"))
    assert all(map(torch.equal, logits(model, pairs(requests)), after))
    loaded, own = model.edits.overlays["memoir"], edit.overlays["memoir"]
    assert torch.equal(loaded.order, own.order)
    assert (loaded.module, loaded.threshold, loaded.active) == (own.module, 0.7, ACTIVE)


def test_a_resumed_run_has_the_columns_of_an_uninterrupted_one(make_model, requests, tmp_path):
    def make():
        return make_model("llama", torch.float32), memoir(steps=2)

    killed_and_resumed(make, requests, tmp_path, 1)


def test_memories_of_other_values_are_not_added_to(make_model, requests):
    model = make_model("llama", torch.bfloat16)
    memory = memory_of(model, memoir(steps=1), requests[:1])
    assert memory.change.dtype == memory.background.dtype == torch.float32
    for other in ({"layer": 0}, {"mask_density": 0.5}, {"threshold": 0.5}):
        with pytest.raises(EditError, match=r"carries a sparse memory beside .* ask for "):
            memoir(**other)(model, requests[1:])
    assert model.edits.overlays["memoir"] is memory
    with pytest.raises(ModelError, match=r"sparse memory beside 'model.layers.1.mlp.down_proj'"):
        make_model("gptj").apply(Edit(overlays={"memoir": memory}))
    with pytest.raises(ConfigError, match=r"memoir: layers .7. are not all"):
        memoir(layer=7)(make_model("llama"), requests)


@pytest.mark.parametrize(
    "broken",
    [
        {"masks": torch.zeros(1, 3, dtype=torch.bool)},
        {"order": torch.zeros(2, 24, dtype=torch.int64)},
        {"facts": torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8)},
    ],
)
def test_damaged_memories_are_a_sentence(broken, make_model, requests, tmp_path):
    edit = memoir(steps=1)(make_model("llama"), requests[:1]).edit
    path = tmp_path / "edit.safetensors"
    save_damaged(edit, "memoir", broken, path)
    with pytest.raises(KMEBenchError, match="is a damaged edit"):
        Edit.load(path)


def test_the_published_number_of_columns_is_reached():
    for density, width in ((0.2857, 14336), (0.25, 16384)):
        assert memoir(mask_density=density)._active(width) == 4096
