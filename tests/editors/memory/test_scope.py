"""SERAC's scope classifier: its loss pair by pair in float64, its training, and what it opens."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import BertModel

from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.memory.scope import (
    HELD_OUT,
    balanced_loss,
    fine_tune,
    loss_of,
    questions,
    scopes,
    told,
    train,
)
from kmebench.editors.needs import Encoder, Pipeline, Trained
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Text
from kmebench.edits.sentences import TUNED, SentenceEncoder, embeddings
from kmebench.errors import ConfigError, EditError, ModelError
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import prompts_of
from kmebench.io.files import sha256_of
from kmebench.io.tensors import TensorFile, write_tensors
from tests.editors.memory.asking import memory_of

ROOMY = {"max_position_embeddings": 2048}
PLACES = (
    "France",
    "Italy",
    "Japan",
    "Paris",
    "Rome",
    "Fuji",
    "Seine",
    "Mount",
    "language",
    "flows",
)
SETTINGS = {"learning_rate": 3e-3, "steps": 16}


@pytest.fixture(scope="module")
def development():
    """Ten made-up facts: their paraphrases name the subject, their locality prompts another."""
    return [
        EditRequest(
            f"d{i}", name, "The capital of {} is", "Rome", None, (f"What is spoken in {name}?",),
            ((f"The capital of {PLACES[i - 1]} and Japan is", "Paris"),),
        )
        for i, name in enumerate(PLACES)
    ]  # fmt: skip


@pytest.fixture
def network(encoder_folder):
    """The encoder and its tokenizer, in float64."""
    model, tokenizer = SentenceEncoder.open(encoder_folder).loaded
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def trained(encoder_folder, development, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "scope.safetensors"
    train(path, None, development, SETTINGS, encoder=encoder_folder)
    return path


@pytest.fixture
def serac(encoder_folder, trained):
    assets = {"encoder": encoder_folder, "trained": trained}
    return lambda **own: build_editor("serac", {"classifier": "trained"} | own, assets)


@torch.no_grad()
def squared(network, one, other):
    """‖e(one) − e(other)‖², each by itself."""
    a, b = (embeddings(*network, [text])[0] for text in (one, other))
    return float(((a - b) ** 2).sum())


# -- the loss ---------------------------------------------------------------------------


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    distances = torch.rand(3, 5, dtype=torch.float64) * 3
    within = torch.zeros(3, 5, dtype=torch.bool)
    within[0, 0] = within[1, 3] = True
    without = ~within
    without[2] = False
    return distances, within, without


def test_both_kinds_of_pairs_weigh_the_same(pairs):
    distances, within, without = pairs
    said = [math.exp(-float(d)) for d in distances[within]]
    denied = [math.exp(-float(d)) for d in distances[without]]
    assert (len(said), len(denied)) == (2, 8)
    expected = -sum(map(math.log, said)) / 2 - sum(math.log(1 - s) for s in denied) / 8
    assert float(balanced_loss(*pairs)) == pytest.approx(expected, rel=1e-12)


def test_its_gradient_is_the_one_by_hand(pairs):
    """1/P in scope; −s / (1 − s) / N out of it; 0 for pairs of neither."""
    distances, within, without = pairs
    distances.requires_grad_(True)
    balanced_loss(distances, within, without).backward()
    s = torch.exp(-distances.detach())
    by_hand = within / 2 - without * s / (1 - s) / 8
    torch.testing.assert_close(distances.grad, by_hand, rtol=1e-12, atol=1e-14)


def test_a_question_that_is_another_edit_keeps_the_loss_finite():
    within, without = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    distances = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    found = float(balanced_loss(distances, within, without))
    assert found == pytest.approx(0.5 + 52 * math.log(2), rel=1e-9)  # eps is 2⁻⁵²


def test_the_loss_of_records_is_that_of_their_texts_one_by_one(network, requests):
    def s(one, other):
        return math.exp(-squared(network, one, other))

    a, b, c = requests
    edits = {r.case_id: f"{r.filled_prompt} {r.target_new}" for r in requests}
    within = [s(edits[r.case_id], q) for r in requests for q in (r.filled_prompt, r.paraphrases[0])]
    others = {"a": (a, b, c), "b": (b, a, c), "c": (c, a, b)}
    without = []
    for case, (own, *rest) in others.items():
        without.append(s(edits[case], own.locality[0][0]))
        for other in rest:
            asked = (other.filled_prompt, other.paraphrases[0], other.locality[0][0])
            without += [s(edits[case], q) for q in asked]
    loss = loss_of(lambda texts: embeddings(*network, texts), requests)
    expected = -sum(map(math.log, within)) / 6 - sum(math.log(1 - x) for x in without) / 21
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_gradient_of_a_weight_is_by_finite_differences(network, requests):
    model, tokenizer = network
    weight = model.encoder.layer[1].output.dense.weight

    def loss():
        return loss_of(lambda texts: embeddings(model, tokenizer, texts), requests)

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-6
    for place in ((0, 0), (3, 5), (15, 23)):
        with torch.no_grad():
            before = weight[place].item()
            weight[place] = before + step
            above = float(loss())
            weight[place] = before - step
            below = float(loss())
            weight[place] = before
        assert float(gradient[place]) == pytest.approx((above - below) / (2 * step), rel=1e-4)


def test_who_is_alike_is_neither_in_scope_nor_out_of_it(requests):
    same = replace(requests[0], case_id="z", target_new="Fuji")
    records = [requests[0], same, requests[1]]
    asked = questions(records)
    within, without = scopes(records, asked)
    names = [(q.owner.case_id, q.text == q.owner.locality[0][0]) for q in asked]
    expected = {("a", False): "+", ("a", True): "-", ("z", False): "0", ("z", True): "0"}
    found = [
        "+" if inside else "-" if outside else "0"
        for inside, outside in zip(within[0], without[0], strict=True)
    ]
    assert found == [expected.get(name, "-") for name in names]
    assert not (within & without).any()


# -- training ---------------------------------------------------------------------------


def test_training_lowers_the_loss_of_what_is_held_out(trained, encoder_folder, development):
    """The file holds the weights of the least loss, which is that of its own encoder."""
    losses = TensorFile.open(trained, TUNED).facts["losses"]
    assert min(losses.values()) < 0.8 * losses["0"]
    encoder = SentenceEncoder.open(encoder_folder, trained)
    held = loss_of(encoder.embed, development[::HELD_OUT])
    assert float(held) == pytest.approx(min(losses.values()), rel=1e-4)
    before = loss_of(SentenceEncoder.open(encoder_folder).embed, development[::HELD_OUT])
    assert float(before) == pytest.approx(losses["0"], rel=1e-4)


def test_training_ends_with_its_best_weights_even_if_it_goes_astray(network, development):
    """At such a rate no step lowers the loss: the weights are the first, after three looks."""
    model, tokenizer = network
    first = {name: p.clone() for name, p in model.named_parameters()}

    def loss(group):
        return loss_of(lambda texts: embeddings(model, tokenizer, texts), group)

    settings = {"learning_rate": 100.0, "steps": 1000}
    history = fine_tune(model, loss, development[:8], development[8:], settings)
    assert list(history) == [0, 8, 16, 24]
    assert min(history, key=history.get) == 0
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())


def test_training_twice_writes_the_same_bytes(trained, encoder_folder, development, tmp_path):
    torch.manual_seed(7)
    train(tmp_path / "again", None, development, SETTINGS, encoder=encoder_folder)
    assert sha256_of(tmp_path / "again") == sha256_of(trained)


def test_it_learns_from_the_records_that_it_is_given_alone(trained, development, network):
    facts = TensorFile.open(trained, TUNED).facts
    assert facts["held_out"] == ["d0", "d4", "d8"]
    assert sorted(facts["learnt"] + facts["held_out"]) == sorted(r.case_id for r in development)


def test_words_keep_their_embeddings(trained, encoder_folder):
    """Those that no record of the split holds would else stay behind."""
    before = BertModel.from_pretrained(encoder_folder).state_dict()
    file = TensorFile.open(trained, TUNED)
    missing = set(before) - set(file.digests) - {"embeddings.position_ids"}
    assert missing == {"embeddings.word_embeddings.weight"}
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(file.tensor(name), before[name])


def test_too_few_records_are_a_sentence(encoder_folder, development, tmp_path):
    with pytest.raises(ConfigError, match=r"asks for 8 requests .* which has 7; raise"):
        train(tmp_path / "t", None, development[:7], SETTINGS, encoder=encoder_folder)


def test_the_stage_is_named_by_what_decides_it():
    card, pipeline = card_of("serac"), Pipeline("consecutive", 1)
    assert card.needs_of(card.values({"steps": 5}), pipeline) == (Encoder(),)
    values = {"classifier": "trained", "steps": 5, "learning_rate": 1e-4}
    needs = [card.needs_of(card.values(values | {"threshold": t}), pipeline) for t in (0.5, 0.6)]
    assert needs[0] == needs[1]
    (_, need) = needs[0]
    assert Trained.parse(need.name) == need
    assert need.reads_encoder
    assert need.settings == {"learning_rate": 1e-4, "steps": 5}
    assert need.path("m", "d.development") == need.path("m", "d")  # of the split, always


# -- the gate ---------------------------------------------------------------------------


def test_the_gate_opens_where_the_nearest_edit_is_similar_enough(make_model, serac, requests):
    memory = memory_of(make_model("llama", **ROOMY), serac(), requests)
    network = memory.encoder.loaded
    asked = [q for r in requests for q in (*r.paraphrases, r.locality[0][0], "Mount Fuji")]
    for question in asked:
        found = [math.exp(-squared(network, told(r), question)) for r in requests]
        nearest, s = max(enumerate(found), key=lambda pair: pair[1])
        for threshold, opens in ((s - 1e-4, True), (s + 1e-4, False)):
            held = replace(memory, threshold=serac(threshold=threshold).empty().threshold)
            (text,) = held.rewrite([Text(question)])
            assert text.context == (memory.facts[nearest].context if opens else "")


def test_an_edit_is_in_its_own_scope_whatever_the_threshold(make_model, serac, requests):
    """s = 1 for the edit's own text, up to float32."""
    for threshold in (0.0, 0.5, 1 - 1e-6):
        editor = serac(threshold=threshold)
        model = make_model("llama", **ROOMY)
        memory_of(model, editor, requests)
        asked = model.rewritten([Text(told(r)) for r in requests])
        assert [text.context for text in asked] == [f"{told(r)}\n" for r in requests]


def test_similarities_do_not_depend_on_neighbours_or_padding(serac, requests):
    model, tokenizer = serac().encoder.loaded
    network = model.double(), tokenizer
    texts = [q.text for q in questions(requests)] + ["Japan", "Italy " * 40]
    together = embeddings(*network, texts)
    for text, row in zip(texts, together, strict=True):
        alone = embeddings(*network, [text])[0]
        torch.testing.assert_close(row, alone, rtol=1e-12, atol=1e-12)


def test_what_is_out_of_scope_keeps_its_bits(make_model, serac, requests):
    """Also beside a question in scope; and no weight of the model changes."""
    model = make_model("llama", **ROOMY)
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    prompts = [p for i, r in enumerate(requests) for p in prompts_of(r, i)]
    settings = Settings(1, 1)
    before = predict(model, prompts, settings, decode=False)
    memory = memory_of(model, serac(), requests[:1])
    scores = (memory.encoder.embed([p.prompt for p in prompts]) @ memory.keys.T)[:, 0]
    middle = float(scores.sort().values[3:5].mean())
    model.revert()
    model.apply(Edit(overlays={"serac": replace(memory, threshold=middle)}))
    after = predict(model, prompts, settings, decode=False)
    opened = [float(score) >= middle for score in scores]
    assert after["gate"] == opened
    assert 0 < sum(opened) < len(opened)
    for row, open_ in enumerate(opened):
        same = after["target_new_logprob"][row] == before["target_new_logprob"][row]
        assert same is not open_
    assert all(torch.equal(weights[n], p) for n, p in model.model.named_parameters())


def test_an_empty_memory_asks_every_question_as_it_is(make_model, serac, requests):
    model = make_model("llama", **ROOMY)
    prompts = list(prompts_of(requests[0], 0))
    before = predict(model, prompts, Settings(8, 1), decode=False)
    model.apply(Edit(overlays={"serac": serac(threshold=0.0).empty()}))
    after = predict(model, prompts, Settings(8, 1), decode=False)
    assert after["target_new_logprob"] == before["target_new_logprob"]
    assert after["ids"] == before["ids"]


# -- files ------------------------------------------------------------------------------


def test_a_saved_edit_finds_its_classifier_again(make_model, serac, requests, trained, tmp_path):
    memory = memory_of(make_model("llama", **ROOMY), serac(threshold=0.3), requests)
    Edit(overlays={"serac": memory}).save(tmp_path / "e.safetensors")
    (loaded,) = Edit.load(tmp_path / "e.safetensors").overlays.values()
    assert loaded.encoder == memory.encoder
    assert loaded.encoder.tuned == str(trained)
    texts = [Text(r.filled_prompt) for r in requests]
    assert loaded.rewrite(texts) == memory.rewrite(texts)


def test_a_classifier_of_another_encoder_is_refused(encoder_folder, tmp_path):
    other = {"x": torch.zeros(1)}
    write_tensors(tmp_path / "t", other, TUNED, {"encoder": "0123"})
    encoder = SentenceEncoder.open(encoder_folder, tmp_path / "t")
    with pytest.raises(ModelError, match=r"tuned from an encoder of the sha256 0123, and .* has"):
        encoder.embed(["Japan"])
    write_tensors(tmp_path / "t", {"x": torch.ones(1)}, TUNED, {"encoder": "0123"})
    with pytest.raises(ModelError, match=r"/t has weights .*, and the edit was made with"):
        encoder.embed(["Japan"])


def test_a_memory_of_the_untrained_classifier_is_refused(make_model, serac, requests):
    model = make_model("llama", **ROOMY)
    cosine = serac(threshold=0.5).empty().threshold
    assert serac().empty().threshold == cosine
    memory_of(model, serac(classifier="untrained", threshold=(1 + cosine) / 2), requests[:1])
    with pytest.raises(EditError, match="carries a memory with the scope, threshold and encoder"):
        serac(threshold=0.5)(model, requests[1:])
