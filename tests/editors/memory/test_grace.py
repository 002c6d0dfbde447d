"""GRACE: its rules, its values against a plain training loop, and a gate that is shut."""

from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.memory import grace as grace_module
from kmebench.editors.memory.grace import GAP
from kmebench.edits.codebook import Codebook
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Passage
from kmebench.errors import ConfigError, EditError, KMEBenchError, ModelError
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches, run_consecutive
from tests.conftest import FAMILIES
from tests.editors.memory.asking import logits, memory_of
from tests.editors.memory.damage import save_damaged

HPARAMS = {"layer": 1, "radius": 1e-3, "steps": 12, "learning_rate": 0.3}


def grace(**hparams):
    return build_editor("grace", HPARAMS | hparams, {})


def module_path(model, projection, layer=1):
    ffn = model.ffn[layer]
    name = (ffn.key if projection == "key" else ffn.value).weight_name
    return name.removesuffix(".weight")


def plain_values(model, request, hparams):
    """Train one value by full forward passes and a hook of our own: the oracle.

    Returns the query and the value; the output is replaced by the definition, position by position.
    """
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    ids, last = torch.tensor([item.ids[:-1]]), len(item.ids) - item.n_target - 1
    module = model.model.get_submodule(module_path(model, hparams["projection"]))
    seen = {}

    def watch(_module, inputs, output):
        seen["query"], seen["output"] = inputs[0][0, last].clone(), output[0, last].clone()

    with module.register_forward_hook(watch), torch.no_grad():
        model.model(ids)
    value = seen["output"].detach().clone().requires_grad_()
    adam = torch.optim.Adam([value], lr=hparams["learning_rate"])
    places = {"last": [last], "prompt": list(range(last + 1)), "all": list(range(ids.shape[1]))}

    def put(_module, _inputs, output):
        rows = [value if t in places[hparams["replacement"]] else output[0, t]
                for t in range(ids.shape[1])]  # fmt: skip
        return torch.stack(rows)[None]

    for _ in range(hparams["steps"]):
        adam.zero_grad()
        with module.register_forward_hook(put), torch.enable_grad():
            said = model.model(ids).logits[0, last:]
        cross_entropy(said, torch.tensor(item.target_ids)).backward()
        adam.step()
    return seen["query"], value.detach()


@pytest.mark.parametrize(
    ("family", "projection", "replacement"),
    [
        *((family, *rest) for family in FAMILIES for rest in (("value", "last"), ("key", "all"))),
        *(("llama", *rest) for rest in (("key", "last"), ("value", "prompt"))),
    ],
)
def test_values_are_those_of_plain_training(family, projection, replacement, make_model, requests):
    model = make_model(family)
    hparams = HPARAMS | {"projection": projection, "replacement": replacement, "steps": 4}
    book = memory_of(model, grace(**hparams), requests)
    model.revert()
    for place, request in enumerate(requests):
        query, value = plain_values(model, request, hparams)
        torch.testing.assert_close(book.keys[place], query, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(book.values[place], value, rtol=1e-7, atol=1e-9)


def test_the_edit_prompt_selects_its_value_bit_by_bit(make_model, requests):
    model = make_model("llama")
    book = memory_of(model, grace(), requests)
    request = requests[1]
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    last, seen = len(item.ids) - item.n_target - 1, []

    def keep(_module, _inputs, output):
        seen.append(output[0, last])

    # Registered after the codebook's hook, so that it sees what that made of the output.
    module = model.model.get_submodule(book.module)
    original = model.passage

    @contextmanager
    def watched(passage):
        with original(passage), module.register_forward_hook(keep):
            yield

    model.passage = watched
    model.answer_logits(model.collate([item]))
    assert torch.equal(seen[0], book.values[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_all_balls_and_without_entries_no_bit_changes(family, make_model, requests):
    model = make_model(family)
    pairs = [r.locality[0] for r in requests[:2]]
    before = logits(model, pairs)
    weights = {n: p.clone() for n, p in model.model.named_parameters()}
    book = memory_of(model, grace(radius=1e-9), requests[:2])
    for old, new in zip(before, logits(model, pairs), strict=True):
        assert torch.equal(old, new)
    none = slice(0, 0)
    empty = replace(
        book, keys=book.keys[none], values=book.values[none], radii=book.radii[none], labels=()
    )
    model.revert()
    model.apply(Edit(overlays={"grace": empty}))
    asked = [(r.filled_prompt, r.target_new) for r in requests]
    with_empty = logits(model, asked)
    model.revert()
    for old, new in zip(logits(model, asked), with_empty, strict=True):
        assert torch.equal(old, new)
    assert all(torch.equal(weights[n], p) for n, p in model.model.named_parameters())


def test_an_open_gate_of_one_row_leaves_the_others_their_bits(make_model, requests):
    model = make_model("gptj")
    pairs = [(requests[0].filled_prompt, "Rome"), ("Mount Fuji stands in", "Paris")]
    batch = model.collate(model.encode(pairs))
    before = model.answer_logits(batch)
    memory_of(model, grace(radius=1e-9), requests[:1])
    after = model.answer_logits(batch)
    other = batch.rows == 1
    assert torch.equal(before[other], after[other])
    assert not torch.equal(before[~other], after[~other])


@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_padding_and_company_do_not_shift_the_query(replacement, make_model, requests):
    model = make_model("llama")
    memory_of(model, grace(replacement=replacement), requests)
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    together = model.answer_logits(model.collate(model.encode(pairs)))
    alone = torch.cat(logits(model, pairs))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_the_gate_opens_inside_the_ball_of_the_nearest_key_and_nowhere_else(replacement):
    """Queries at known distances from two keys, on a hook without a model."""
    keys = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    radii = torch.tensor([1.0, 3.0], dtype=torch.float64)
    book = Codebook("w", replacement, keys, values, radii, ((1,), (2,)))
    x = [0.0, 0.999, 1.001, 1.9, 5.1, 6.9, 7.0, 9.0, 12.9, 13.1]
    expected = [1, 1, 0, 0, 0, 0, 2, 2, 2, 0]
    inputs = torch.full((len(x), 4, 2), 50.0, dtype=torch.float64)
    inputs[:, 2] = torch.tensor([[place, 0.0] for place in x], dtype=torch.float64)
    passage = Passage(torch.full((len(x),), 2))
    output = torch.zeros(len(x), 4, 1, dtype=torch.float64)
    replaced = book.hooks(passage)["w"](inputs, output)[..., 0]
    columns = {"last": [2], "prompt": [0, 1, 2], "all": [0, 1, 2, 3]}[replacement]
    wanted = torch.zeros(len(x), 4, dtype=torch.float64)
    wanted[:, columns] = torch.tensor(expected, dtype=torch.float64)[:, None]
    assert torch.equal(replaced, wanted)
    assert not output.any()


def test_a_batch_is_what_one_by_one_is(make_model, requests):
    model = make_model("gpt2")
    together = memory_of(model, grace(micro_batch=2), requests)
    model.revert()
    for request in requests:
        alone = memory_of(model, grace(), [request])
    torch.testing.assert_close(together.values, alone.values, rtol=1e-10, atol=1e-10)
    assert torch.equal(together.radii, alone.radii)
    assert together.labels == alone.labels


def by_itself(model, first, second, radius):
    """Edit two requests in turn; return distance, codebook before and after the second."""
    editor = grace(radius=radius, steps=2)
    before = memory_of(model, editor, [first])
    after = memory_of(model, editor, [second])
    queries = [edited_query(model, r) for r in (first, second)]
    return float((queries[0] - queries[1]).norm()), before, after


def edited_query(model, request):
    model.edits.overlays = {}
    query, _ = plain_values(
        model, request, HPARAMS | {"projection": "value", "replacement": "last", "steps": 0}
    )
    return query


def test_conflicting_balls_shrink_until_they_do_not_meet(make_model, requests):
    model = make_model("llama")
    distance, before, after = by_itself(model, requests[0], requests[2], radius=100.0)
    assert before.radii.tolist() == [100.0]
    assert after.entries == 2
    assert after.radii.tolist() == pytest.approx([distance / 2 - GAP, distance / 2])
    assert float(after.radii.sum()) < distance


def test_a_ball_never_grows_by_a_conflict(make_model, requests):
    model = make_model("llama")
    distance, *_ = by_itself(model, requests[0], requests[2], radius=100.0)
    model.revert()
    radius = 0.6 * distance  # below d < r0 + r, so that they conflict; d/2 is smaller than it
    _, _, after = by_itself(model, requests[0], requests[2], radius)
    assert after.radii.tolist() == pytest.approx([distance / 2 - GAP, distance / 2])
    model.revert()
    book = memory_of(model, grace(radius=0.1 * distance, steps=1), requests[:1])
    model.revert()
    model.apply(Edit(overlays={"grace": book}))
    far = memory_of(model, grace(radius=0.95 * distance, steps=1), [requests[2]])
    assert far.radii.tolist() == pytest.approx([0.1 * distance, distance / 2])


def test_the_same_answer_stretches_the_ball_and_needs_no_entry(make_model, requests):
    model = make_model("llama")
    same = replace(requests[2], target_new=requests[0].target_new)
    distance, _, after = by_itself(model, requests[0], same, radius=1e-6)
    assert after.entries == 2  # d > r0 + r
    model.revert()
    _, _, after = by_itself(model, requests[0], same, radius=0.7 * distance)
    assert after.entries == 1
    assert after.radii.tolist() == pytest.approx([distance])


def test_a_fact_that_is_edited_again_takes_its_entry_over(make_model, requests):
    model = make_model("llama")
    editor = grace()
    memory_of(model, editor, requests)
    again = replace(requests[0], target_new="Fuji")
    book = memory_of(model, editor, [again])
    (item,) = model.encode([(again.filled_prompt, "Fuji")])
    assert book.entries == 3
    assert book.labels[0] == item.target_ids
    assert book.radii.tolist() == [1e-3] * 3


def test_a_fact_that_is_edited_again_in_other_company_takes_its_entry_over(make_model, requests):
    """In a batch of another shape rounding gives the same prompt another query."""
    model = make_model("llama", torch.float32)
    editor, again = grace(), replace(requests[0], target_new="Fuji")
    first = memory_of(model, editor, requests)
    query = edited_query(model, requests[0]) * (1 + 5e-5)
    moved = replace(first, keys=torch.cat([query[None], first.keys[1:]]))
    model.apply(Edit(overlays={"grace": moved}))
    book = memory_of(model, editor, [again])
    (item,) = model.encode([(again.filled_prompt, "Fuji")])
    assert book.labels == (item.target_ids, *first.labels[1:])
    assert torch.equal(book.radii, first.radii)


def test_facts_that_share_an_entry_are_edited_one_after_another(make_model, requests):
    model = make_model("llama")
    same = replace(requests[2], target_new=requests[0].target_new)
    together = memory_of(model, grace(radius=1e3, steps=3), [requests[0], same])
    model.revert()
    for request in (requests[0], same):
        apart = memory_of(model, grace(radius=1e3, steps=3), [request])
    torch.testing.assert_close(together.values, apart.values, rtol=1e-10, atol=1e-10)
    assert together.entries == apart.entries == 1


@pytest.mark.parametrize("family", ["gptj", "opt", "gemma3_text"])
@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_generation_decides_once_on_the_prompt(family, replacement, make_model, requests):
    """Cached decoding against whole passes over the growing text, without a cache."""
    model = make_model(family)
    book = memory_of(model, grace(replacement=replacement, radius=1e-6), requests)
    prompts = [requests[0].filled_prompt, "Mount Fuji stands in", requests[1].filled_prompt]
    ids = model.encode_prompts(prompts)
    said = model.generate(ids, 4)
    for row, prompt in enumerate(ids):
        text, last = list(prompt), len(prompt) - 1
        module = model.model.get_submodule(book.module)

        def put(_module, inputs, output, last=last):
            query = inputs[0][0, last]
            distances = (book.keys - query).norm(dim=1)
            entry = int(distances.argmin())
            if distances[entry] > book.radii[entry]:
                return output
            until = {"last": slice(last, last + 1), "prompt": slice(0, last + 1)}
            new = output.clone()
            new[0, until.get(replacement, slice(None))] = book.values[entry]
            return new

        for _ in range(4):
            with module.register_forward_hook(put), torch.no_grad():
                text.append(int(model.model(torch.tensor([text])).logits[0, -1].argmax()))
        assert said[row].tolist() == text[-4:] or model.tokenizer.eos_token_id in text[-4:]


def test_saved_and_loaded_the_model_says_the_same(make_model, requests, tmp_path):
    model = make_model("llama")
    asked = [(r.filled_prompt, r.target_new) for r in requests]
    untouched = logits(model, asked)
    edit = grace()(model, requests).edit
    model.apply(edit)
    after = logits(model, asked)
    edit.save(tmp_path / "edit.safetensors")
    model.revert()
    for one, other in zip(logits(model, asked), untouched, strict=True):
        assert torch.equal(one, other)
    loaded = Edit.load(tmp_path / "edit.safetensors")
    model.apply(loaded)
    for one, other in zip(logits(model, asked), after, strict=True):
        assert torch.equal(one, other)


def test_a_savepoint_takes_overlays_back(make_model, requests):
    model = make_model("llama")
    first = memory_of(model, grace(), requests[:1])
    with model.edits.savepoint():
        memory_of(model, grace(), requests[1:])
    assert model.edits.overlays["grace"] is first


def test_a_model_without_the_layer_is_refused(make_model, requests):
    book = memory_of(make_model("llama"), grace(), requests)
    with pytest.raises(ModelError, match=r"a codebook beside 'model.layers.1.mlp.down_proj'"):
        make_model("gptj").apply(Edit(overlays={"grace": book}))
    with pytest.raises(ConfigError, match=r"grace: layers .7. are not all"):
        grace(layer=7)(make_model("llama"), requests)


def test_a_resumed_run_has_the_codebook_of_an_uninterrupted_one(make_model, requests, tmp_path):
    class FailingError(Exception):
        pass

    def run(folder, fail_at=None):
        model, editor = make_model("gptj", torch.float32), grace(start="cold")
        torch.manual_seed(0)
        if fail_at is not None:
            whole = editor.edit

            def edit(model, asked):
                if asked[0].case_id == fail_at:
                    raise FailingError
                return whole(model, asked)

            editor.edit = edit
        saved = Checkpoints(tmp_path / folder, 1, {})
        return run_consecutive(Setup(model, editor, Settings(8, 2), saved), requests)

    straight = run("a")
    with pytest.raises(FailingError):
        run("b", fail_at="c")
    resumed = run("b")
    one, other = (r.edit.overlays["grace"] for r in (straight, resumed))
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.keys, other.keys)
    assert one.labels == other.labels
    frames = [
        r.predictions.map(lambda cell: tuple(cell) if hasattr(cell, "__len__") else cell)
        for r in (straight, resumed)
    ]
    pd.testing.assert_frame_equal(*frames)


def test_batches_are_rolled_back(make_model, requests, tmp_path):
    model = make_model("gptj", torch.float32)
    saved = Checkpoints(tmp_path, 1, {})
    run_batches(Setup(model, grace(), Settings(8, 2), saved), requests, 2)
    assert model.edits.overlays == {}


def test_a_fact_is_learnt_and_neighbours_stay(trained, capital_requests):
    request: EditRequest = capital_requests[0]
    editor = build_editor("grace", {"layer": 1, "radius": 0.5, "steps": 40}, {})
    (item,) = trained.encode([(request.filled_prompt, request.target_new)])
    memory_of(trained, editor, [request])
    try:
        said = trained.answer_logits(trained.collate([item])).argmax(dim=1)
        assert said.tolist() == list(item.target_ids)
    finally:
        trained.revert()


@pytest.mark.parametrize("other", [{"layer": 0}, {"projection": "key"}, {"replacement": "all"}])
def test_a_codebook_of_other_values_is_not_added_to(other, make_model, requests):
    model = make_model("llama")
    book = memory_of(model, grace(), requests[:1])
    with pytest.raises(EditError, match=r"carries a codebook beside .* ask for another one"):
        grace(**other)(model, requests[1:])
    assert model.edits.overlays["grace"] is book


def test_a_fact_outside_its_own_ball_is_a_sentence(make_model, requests, monkeypatch):
    """Rounding may move a query between two batches; a ball of no radius holds nothing then."""
    model, editor = make_model("llama"), grace(radius=0)
    asked = grace_module.at_last_tokens
    moved = lambda *a: [x + 1e-9 for x in asked(*a)]  # noqa: E731
    monkeypatch.setattr(grace_module, "at_last_tokens", moved)
    with pytest.raises(EditError, match=r"request .a. outside the ball of its own .* raise"):
        editor(model, requests)


@pytest.mark.parametrize("replacement", ["prompt", "all"])
def test_two_codebooks_beside_one_layer_decide_apart(replacement, make_model, requests):
    """The second is of another fact: what it decides must not open or close the first."""
    model = make_model("gptj")
    editor = grace(replacement=replacement)
    book = memory_of(model, editor, requests)
    ids = model.encode_prompts([r.filled_prompt for r in requests])
    alone = model.generate(ids, 4)
    shut = replace(book, keys=book.keys[:1] + 1e3, values=book.values[:1], radii=book.radii[:1])
    model.apply(Edit(overlays={"theirs": replace(shut, labels=book.labels[:1])}))
    assert torch.equal(model.generate(ids, 4), alone)


@pytest.mark.parametrize(
    "broken",
    [
        {"values": torch.zeros(0, 2)},
        {"radii": torch.zeros(1)},
        {"keys": torch.zeros(3)},
        {"facts": torch.frombuffer(bytearray(b"[1, 2, 3]"), dtype=torch.uint8)},
        {"facts": torch.tensor([1.5])},
    ],
)
def test_a_damaged_codebook_is_a_sentence(broken, make_model, requests, tmp_path):
    edit = grace(steps=1)(make_model("llama"), requests).edit
    path = tmp_path / "edit.safetensors"
    save_damaged(edit, "grace", broken, path)
    with pytest.raises(KMEBenchError, match="is a damaged edit"):
        Edit.load(path)
