"""WISE: its training against whole forward passes, its routes, its shards and their merger."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest, write_requests
from kmebench.editors.base import build_editor
from kmebench.editors.contexts import prefixes
from kmebench.editors.memory.cards import WISE_TEXTS
from kmebench.editors.memory.ties import ties
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Passage
from kmebench.edits.side_memory import SideMemory
from kmebench.errors import ConfigError, EditError, KMEBenchError, ModelError
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches
from tests.conftest import FAMILIES
from tests.editors.memory.asking import logits, memory_of, module_of, pairs
from tests.editors.memory.damage import save_damaged
from tests.pipelines.runs import killed_and_resumed

DOUBLE = torch.float64
HPARAMS = {"layer": 1, "learning_rate": 0.2, "steps": 5, "margins": [0.01, 2.0, 1.5]}
HPARAMS |= {"mask_density": 0.5, "tolerance": 0.0, "micro_batch": 2}


@pytest.fixture
def development(tmp_path):
    """Records about other subjects, each with one locality prompt."""
    records = [
        EditRequest(f"d{i}", subject, "The capital of {} is", "Fuji", "x", (), ((prompt, "y"),))
        for i, (subject, prompt) in enumerate(
            [("Spain", "Mount Fuji stands in"), ("Cuba", "the Seine flows through")]
        )
    ]
    write_requests(tmp_path / "d.jsonl", records)
    return tmp_path / "d.jsonl"


@pytest.fixture
def wise(development):
    return lambda **hparams: build_editor("wise", HPARAMS | hparams, {"development": development})


def w2_of(model):
    """W2 [out, in] of the edited layer, however it is stored."""
    weight = model.parameter(model.ffn[1].value.weight_name).detach()
    return weight if model.ffn[1].value.axis == 1 else weight.T


def through(model, ids, side):
    """One text, whole, with W2's copy ``side`` [out, in] in the place of W2.

    Returns the logits [T, vocabulary] and the distances [T] of the copy's outputs from W2's.
    """
    original, seen = w2_of(model), []

    def copied(_module, inputs, output):
        here, there = inputs[0] @ original.T, inputs[0] @ side.T
        seen.append((there - here)[0].norm(dim=1))
        return output - here + there

    with module_of(model).register_forward_hook(copied):
        return model.model(torch.tensor([ids])).logits[0], seen[0]


def literal(model, editor, requests, unrelated, mask, side=None):
    """Train W' [out, in] by torch's SGD, text by text, by the definition of the loss.

    Returns it with the share of steps in which each margin was not kept.
    """
    original, h = w2_of(model), editor.hparams
    alpha, beta, gamma = h.margins
    side = (original if side is None else side).clone().requires_grad_()
    sgd, active = torch.optim.SGD([side], lr=h.learning_rate), torch.zeros(3)
    for _ in range(h.steps):
        sgd.zero_grad()
        total = 0
        for request, other in zip(requests, unrelated, strict=True):
            (ids,) = model.encode_prompts([other])
            quiet = through(model, ids, side)[1].mean()
            total = total + (quiet - alpha).clamp(min=0)
            contexts = prefixes(editor.contexts(model))
            for text in contexts:
                (item,) = model.encode([(text + request.filled_prompt, request.target_new)])
                said, distances = through(model, item.ids, side)
                n = item.n_target
                loud = distances[:-n].mean()
                loss = cross_entropy(said[-n - 1 : -1], torch.tensor(item.target_ids))
                loss = loss + (beta - loud).clamp(min=0) + (gamma - (loud - quiet)).clamp(min=0)
                total = total + loss / len(contexts)
                active += torch.tensor([quiet > alpha, loud < beta, loud - quiet < gamma])
        (total / len(requests)).backward()
        side.grad *= mask
        sgd.step()
        with torch.no_grad():
            side.copy_(side.clamp(original - h.norm_constraint, original + h.norm_constraint))
    return side.detach(), active / (h.steps * len(requests) * WISE_TEXTS)


OTHERS = ["Mount Fuji stands in", "the Seine flows through"]


def drawn(requests):
    """The unrelated prompts that the next edit draws."""
    return [OTHERS[int(torch.randint(2, ()))] for _ in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_is_trained_as_a_copy_of_w2_would_be(family, make_model, requests, wise):
    model, editor = make_model(family), wise(norm_constraint=0.05)
    torch.manual_seed(3)
    with torch.random.fork_rng():
        mask = torch.rand(w2_of(model).shape) < 0.5
        others = drawn(requests)
    weights = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    memory = memory_of(model, editor, requests)
    assert all(torch.equal(weights[n], p) for n, p in model.model.named_parameters())
    assert torch.equal(memory.mask, mask)
    model.revert()
    with torch.enable_grad():
        side, active = literal(model, editor, requests, others, mask)
    change = memory.changes[0]
    torch.testing.assert_close(change, side - w2_of(model), rtol=1e-7, atol=1e-9)
    assert active.all()  # every margin was crossed
    assert change.abs().max() == 0.05
    assert not change[~mask].any()
    asked = model.encode(pairs(requests))
    heard = [through(model, e.ids[: -e.n_target], side)[1].mean() for e in asked]
    torch.testing.assert_close(memory.thresholds[0], min(heard), rtol=1e-9, atol=0)


def test_a_second_edit_goes_on_from_the_first_and_is_compared_with_w2(make_model, requests, wise):
    model, editor = make_model("llama"), wise()
    torch.manual_seed(1)
    first = memory_of(model, editor, requests[:1])
    with torch.random.fork_rng():
        others = drawn(requests[1:2])
    second = memory_of(model, editor, requests[1:2])
    assert (second.entries, second.edits) == (1, (2,))
    assert torch.equal(first.mask, second.mask)
    model.revert()
    original = w2_of(model)
    start = original + first.changes[0]
    with torch.enable_grad():
        side, _ = literal(model, editor, requests[1:2], others, first.mask, start)
    torch.testing.assert_close(second.changes[0], side - original, rtol=1e-7, atol=1e-9)
    (item,) = model.encode(pairs(requests[1:2]))
    own = through(model, item.ids[: -item.n_target], side)[1].mean()
    assert second.thresholds[0] == pytest.approx(min(float(first.thresholds[0]), float(own)))


def test_parts_of_a_batch_are_the_batch(make_model, requests, wise):
    changes = []
    for micro_batch in (1, 2, 3):
        model = make_model("gptj")
        torch.manual_seed(0)
        changes.append(memory_of(model, wise(micro_batch=micro_batch), requests).changes)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(changes[0], changes[2], rtol=1e-9, atol=1e-12)


def test_training_ends_where_the_loss_is_small_and_stands_still(make_model, requests, wise):
    model, never = make_model("llama"), {"margins": [1e9, 0.0, 0.0], "learning_rate": 0.0}
    # Without steps the loss stands still at once; only where it is small, too, training ends.
    editor = wise(**never, tolerance=1e9)
    editor(model, requests)
    assert editor.steps == 1
    editor = wise(**never, tolerance=0.0)
    editor(model, requests)
    assert editor.steps == HPARAMS["steps"]


# -- routes ----------------------------------------------------------------------------


def hand_made(changes, thresholds, ratio=0.5):
    """Memories [n] beside a layer from one number to one, with Δ and ε of each."""
    changes = torch.tensor(changes, dtype=DOUBLE)[:, None, None]
    mask = torch.ones(1, 1, dtype=torch.bool)
    edits = (1,) * len(thresholds)
    return SideMemory("w", ratio, changes, torch.tensor(thresholds, dtype=DOUBLE), mask, edits)


def routed(memory, inputs, **passage):
    """What a hook makes of outputs 100 for rows of numbers, [R, T]."""
    inputs = torch.tensor(inputs, dtype=DOUBLE)[..., None]
    output = torch.full_like(inputs, 100.0)
    return memory.hooks(Passage(**passage))["w"](inputs, output)[..., 0], output


def test_a_row_goes_through_the_loudest_memory_that_reaches_its_own_threshold():
    """Activations by hand: mean |Δ a| over the prompt, columns 0 and 1; the third is an answer."""
    memory = hand_made([1.0, 3.0, -0.5], [2.0, 12.0, 0.4])  # they open from 1, 6 and 0.2 on
    rows = [
        [0.1, 0.1, 9.0],  # 0.1, 0.3, 0.05: none, whatever the answer is
        [0.5, 0.3, 1.0],  # 0.4, 1.2, 0.2: the third alone
        [1.0, 1.0, 1.0],  # 1, 3, 0.5: first and third, the first is louder
        [-2.0, 2.0, 1.0],  # 2, 6, 1: all, the second is the loudest
    ]
    new, old = routed(memory, rows, prompt_last=torch.tensor([1, 1, 1, 1]))
    assert torch.equal(new[0], old[0, :, 0])
    expected = torch.tensor([[-0.25, -0.15, -0.5], [1.0, 1.0, 1.0], [-6.0, 6.0, 3.0]], dtype=DOUBLE)
    torch.testing.assert_close(new[1:], 100 + expected, rtol=1e-15, atol=0)


def test_a_closed_gate_returns_what_it_was_given_and_a_threshold_itself_opens():
    memory = hand_made([1.0], [2.0])
    inputs, output = torch.full((1, 1, 1), 0.999, dtype=DOUBLE), torch.zeros(1, 1, 1, dtype=DOUBLE)
    hook = memory.hooks(Passage(torch.tensor([0])))["w"]
    assert hook(inputs, output) is output
    assert hook(torch.ones_like(inputs), output) == 1
    silent = hand_made([0.0], [0.0])
    assert silent.hooks(Passage(torch.tensor([0])))["w"](inputs, output) is output
    none = hand_made([], [])
    assert none.hooks(Passage(torch.tensor([0])))["w"](inputs, output) is output


def test_padding_on_either_side_is_not_heard():
    memory, nan = hand_made([1.0], [2.0]), float("nan")
    first, last = torch.tensor([1, 0]), torch.tensor([2, 1])
    rows = [[nan, 0.6, 0.6], [1.2, 1.4, nan]]
    new, _ = routed(memory, rows, prompt_last=last, prompt_first=first)
    assert new[0, 1:].tolist() == [100.0, 100.0]
    assert new[1, :2].tolist() == pytest.approx([101.2, 101.4])


def test_a_decision_of_the_prefill_is_obeyed_by_what_is_said():
    memory, passage = hand_made([1.0], [2.0]), Passage(torch.tensor([1, 1]), phase="prefill")
    hook = memory.hooks(passage)["w"]
    loud = torch.tensor([[5.0, 5.0], [0.1, 0.1]], dtype=DOUBLE)[..., None]
    hook(loud, torch.zeros_like(loud))
    passage.phase = "decode"
    said = torch.tensor([[0.1], [9.0]], dtype=DOUBLE)[..., None]
    assert hook(said, torch.zeros_like(said)).flatten().tolist() == [0.1, 0.0]


# -- in a model --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_prompt_goes_through_the_copy_and_others_keep_their_bits(
    family, make_model, requests, wise
):
    model = make_model(family)
    other = ("Mount Fuji stands in", "Japan")
    before = logits(model, [other])
    torch.manual_seed(0)
    memory = memory_of(model, wise(steps=3), requests[:1])
    # Far above what this prompt's activation is; the edit's own is where it was.
    shut = replace(memory, thresholds=memory.thresholds * 1e3)
    opened = [model.answer_logits(model.collate([e])) for e in model.encode(pairs(requests[:1]))]
    model.apply(Edit(overlays={"wise": shut}))
    assert torch.equal(logits(model, [other])[0], before[0])
    model.revert()
    (item,) = model.encode(pairs(requests[:1]))
    with torch.no_grad():
        said, _ = through(model, item.ids, w2_of(model) + memory.changes[0])
    torch.testing.assert_close(opened[0], said[-item.n_target - 1 : -1], rtol=1e-9, atol=1e-10)


def test_company_and_padding_change_no_route(make_model, requests, wise):
    model = make_model("llama")
    torch.manual_seed(0)
    memory = memory_of(model, wise(), requests[:2])
    heard = activations(model, memory, pairs(requests))
    model.apply(Edit(overlays={"wise": opens_for_two(memory, heard)}))
    alone = logits(model, pairs(requests))
    together = model.answer_logits(model.collate(model.encode(pairs(requests))))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-11)
    model.revert()
    same = [torch.equal(a, b) for a, b in zip(alone, logits(model, pairs(requests)), strict=True)]
    assert sorted(same) == [False, False, True]


def test_an_open_gate_of_some_rows_leaves_the_others_their_bits(make_model, requests, wise):
    model = make_model("gptj")
    torch.manual_seed(0)
    memory = memory_of(model, wise(), requests[:2])
    model.revert()
    batch = model.collate(model.encode(pairs(requests)))
    before = model.answer_logits(batch)
    heard = activations(model, memory, pairs(requests))
    model.apply(Edit(overlays={"wise": opens_for_two(memory, heard)}))
    passage = Passage(batch.prompt_last, batch.rows)
    after = model.answer_logits(batch, passage=passage)
    assert model.gated
    assert passage.opened.tolist() == [x != min(heard) for x in heard]
    closed = batch.rows == heard.index(min(heard))
    assert torch.equal(before[closed], after[closed])
    for row in set(range(3)) - {heard.index(min(heard))}:
        assert not torch.equal(before[batch.rows == row], after[batch.rows == row])


def opens_for_two(memory, heard):
    """The memory, with a threshold between the lowest and the middle of three activations."""
    between = sum(sorted(heard)[:2]) / 2
    return replace(memory, thresholds=memory.thresholds.new_tensor([between]) / memory.ratio)


def activations(model, memory, asked):
    """A of each prompt by the first memory, by itself, from whole passes over W2 and its copy."""
    side = w2_of(model) + memory.changes[0]
    with torch.no_grad():
        return [
            float(through(model, e.ids[: -e.n_target], side)[1].mean()) for e in model.encode(asked)
        ]


@pytest.mark.parametrize("family", ["gptj", "opt", "gemma3_text"])
def test_generation_decides_once_on_the_prompt(family, make_model, requests, wise):
    """Cached decoding of padded rows against whole passes over the growing text."""
    model = make_model(family)
    torch.manual_seed(0)
    memory = memory_of(model, wise(), requests[:2])
    prompts = [requests[0].filled_prompt, "Mount Fuji stands in, and the", "Paris"]
    ids = model.encode_prompts(prompts)
    side = w2_of(model) + memory.changes[0]
    with torch.no_grad():
        heard = [float(through(model, row, side)[1].mean()) for row in ids]
    model.apply(Edit(overlays={"wise": opens_for_two(memory, heard)}))
    said = model.generate(ids, 4)
    model.revert()
    for row, loud, new in zip(ids, heard, said, strict=True):
        text, taken = list(row), loud >= sorted(heard)[1]
        with torch.no_grad():
            for _ in range(4):
                weight = side if taken else w2_of(model)
                text.append(int(through(model, text, weight)[0][-1].argmax()))
        assert new.tolist() == text[-4:] or model.tokenizer.eos_token_id in text[-4:]


# -- shards and their merger -------------------------------------------------------------


def test_full_memories_are_merged_and_the_next_edit_begins_another(make_model, requests, wise):
    model = make_model("llama")
    editor = wise(shard_edits=1, merged_shards=2, merge_density=0.9)
    torch.manual_seed(0)
    seen = []
    for request in (requests[0], requests[1], requests[2], requests[0]):
        before = model.edits.overlays.get("wise")
        seen.append(memory_of(model, editor, [request]))
        assert before is None or seen[-2] is before
    one, two, three, four = seen
    assert [m.edits for m in seen] == [(1,), (2,), (2, 1), (2, 2)]
    assert [m.merged for m in seen] == [0, 1, 1, 2]
    assert torch.equal(three.changes[0], two.changes[0])
    assert not torch.equal(one.mask, two.mask)
    # What the second edit wrote by itself: the same draws, before they were merged.
    model.revert()
    torch.manual_seed(0)
    apart = wise(shard_edits=1, merged_shards=9)
    for request in requests[:2]:
        unmerged = memory_of(model, apart, [request])
    assert unmerged.edits == (1, 1)
    assert torch.equal(two.changes[0], ties(unmerged.changes, 0.9))
    assert torch.equal(two.thresholds, unmerged.thresholds.min()[None])
    assert four.entries == 2


def test_a_turn_that_overfills_a_memory_stays_in_it(make_model, requests, wise):
    model, editor = make_model("llama"), wise(shard_edits=2)
    torch.manual_seed(0)
    assert memory_of(model, editor, requests).edits == (3,)
    assert memory_of(model, editor, requests[:1]).edits == (3, 1)


def test_ties_trims_elects_and_averages_entry_by_entry():
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(3, 4, 5, generator=generator, dtype=DOUBLE)
    changes[0, 0] = 0.0
    merged = ties(changes, 0.6)
    kept = []
    for change in changes:
        floor = change.abs().flatten().sort(descending=True).values[11]  # 12 of 20
        kept.append(torch.where(change.abs() >= floor, change, 0.0))
    for i in range(4):
        for j in range(5):
            entries = [float(k[i, j]) for k in kept]
            sign = 1 if sum(entries) >= 0 else -1
            agreeing = [x for x in entries if x * sign > 0]
            expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert float(merged[i, j]) == pytest.approx(expected, rel=1e-14)


def test_ties_of_one_is_itself_and_of_disjoint_ones_their_sum():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(2, 4, 5, generator=generator, dtype=DOUBLE)
    assert torch.equal(ties(change[:1], 1.0), change[0])
    mask = torch.rand(4, 5, generator=generator) < 0.5
    apart = torch.stack([change[0] * mask, change[1] * ~mask])
    assert torch.equal(ties(apart, 1.0), apart.sum(dim=0))
    even = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])  # a sum of zero has the sign of plus
    assert ties(even, 1.0).tolist() == [1.0, 2.0]


# -- files, checkpoints, and what is refused ---------------------------------------------


def test_saved_and_loaded_the_model_says_the_same(make_model, requests, wise, tmp_path):
    model = make_model("gpt2")
    edit = wise(shard_edits=1, merged_shards=9)(model, requests[:1]).edit
    untouched = logits(model, pairs(requests))
    model.apply(edit)
    after = logits(model, pairs(requests))
    edit.save(tmp_path / "edit.safetensors")
    model.revert()
    assert all(map(torch.equal, logits(model, pairs(requests)), untouched))
    model.apply(Edit.load(tmp_path / "edit.safetensors"))
    assert all(map(torch.equal, logits(model, pairs(requests)), after))
    loaded, own = model.edits.overlays["wise"], edit.overlays["wise"]
    assert (loaded.edits, loaded.merged, loaded.ratio) == (own.edits, own.merged, own.ratio)
    assert torch.equal(loaded.mask, own.mask)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_resumed_run_has_the_memories_of_an_uninterrupted_one(
    turn, make_model, requests, wise, tmp_path
):
    def make():
        return make_model("llama", torch.float32), wise(shard_edits=1, steps=2)

    killed_and_resumed(make, requests, tmp_path, turn)


def test_batches_are_rolled_back(make_model, requests, wise, tmp_path):
    model = make_model("gptj", torch.float32)
    saved = Checkpoints(tmp_path / "saved", 1, {})
    run_batches(Setup(model, wise(steps=2), Settings(8, 2), saved), requests, 2)
    assert model.edits.overlays == {}


def test_a_bfloat16_model_has_float32_memories(make_model, requests, wise):
    memory = memory_of(make_model("llama", torch.bfloat16), wise(), requests[:1])
    assert memory.changes.dtype == memory.thresholds.dtype == torch.float32


def test_memories_of_other_values_are_not_added_to(make_model, requests, wise):
    model = make_model("llama")
    memory = memory_of(model, wise(), requests[:1])
    for other in ({"layer": 0}, {"activation_ratio": 0.5}):
        with pytest.raises(EditError, match=r"carries side memories beside .* ask for "):
            wise(**other)(model, requests[1:])
    assert model.edits.overlays["wise"] is memory
    with pytest.raises(ModelError, match=r"side memories beside 'model.layers.1.mlp.down_proj'"):
        make_model("gptj").apply(Edit(overlays={"wise": memory}))
    with pytest.raises(ConfigError, match=r"wise: layers .7. are not all"):
        wise(layer=7)(make_model("llama"), requests)


def test_a_request_is_never_set_against_a_record_like_it(make_model, requests, wise, development):
    like = replace(requests[0], case_id="x", locality=(("Rome", "y"),))
    write_requests(development, [like])
    with pytest.raises(EditError, match=r"wise: no development record .* request 'a'; raise dev"):
        wise()(make_model("llama"), requests[:1])


@pytest.mark.parametrize(
    "broken",
    [
        {"changes": torch.zeros(2, 2)},
        {"thresholds": torch.zeros(2)},
        {"mask": torch.zeros(3, dtype=torch.bool)},
        {"facts": torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8)},
    ],
)
def test_damaged_memories_are_a_sentence(broken, make_model, requests, wise, tmp_path):
    edit = wise(steps=1)(make_model("llama"), requests).edit
    path = tmp_path / "edit.safetensors"
    save_damaged(edit, "wise", broken, path)
    with pytest.raises(KMEBenchError, match="is a damaged edit"):
        Edit.load(path)


def test_what_is_counted_without_torch_is_what_the_editor_does(make_model, wise):
    assert len(prefixes(wise().contexts(make_model("llama")))) == WISE_TEXTS
