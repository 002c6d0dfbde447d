"""IKE and SERAC: their texts word for word, and retrieval one pair at a time."""

from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch

from kmebench.data.records import EditRequest, write_requests
from kmebench.editors.base import build_editor
from kmebench.editors.memory.text_editor import ROOM
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Text
from kmebench.edits.sentences import SentenceEncoder
from kmebench.edits.text_memory import Fact, TextMemory
from kmebench.errors import EditError, KMEBenchError
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches, run_consecutive
from tests.editors.memory.asking import memory_of

ROOMY = {"max_position_embeddings": 2048}
VALUES = {"ike": {"demonstrations": 8}, "serac": {}}
NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ivy", "Jo")


@pytest.fixture(scope="module")
def development():
    return [
        EditRequest(
            f"d{i}", name, "{} lives in", "Rome", "Paris", (f"{name}, a resident of",),
            (("The Seine flows through", "Paris"),),
        )
        for i, name in enumerate(NAMES)
    ]  # fmt: skip


@pytest.fixture
def assets(encoder_folder, development, tmp_path):
    write_requests(tmp_path / "development.jsonl", development)
    return {"encoder": encoder_folder, "development": tmp_path / "development.jsonl"}


@pytest.fixture
def ike(assets):
    return lambda **hparams: build_editor("ike", {"demonstrations": 8} | hparams, assets)


def cosine(encoder, one, other):
    """The cosine of two texts, embedded one by one."""
    a, b = (encoder.embed([text])[0] for text in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


# -- texts ------------------------------------------------------------------------------


def test_without_demonstrations_a_question_stands_behind_its_fact(make_model, ike, requests):
    """ICE, word for word."""
    model = make_model("llama", **ROOMY)
    memory_of(model, ike(demonstrations=0, threshold=0.0), requests[:1])
    (asked,) = model.rewritten([Text("The capital of France is", "Rome")])
    assert asked.prompt == (
        "New Fact: The capital of France is Rome\n"
        "Prompt: The capital of France is Rome\n"
        "\n"
        "New Fact: The capital of France is Rome\n"
        "Prompt: The capital of France is"
    )
    assert asked.target == "Rome"


def test_a_context_word_for_word(make_model, ike, requests):
    torch.manual_seed(5)
    model = make_model("llama", **ROOMY)  # seeds by 0
    editor = ike(demonstrations=8)
    (context,) = editor.contexts(requests[:1])
    shown = [r.subject for r in editor._nearest(requests[0], query(editor, requests[0]))]
    lines = context.split("\n\n")
    assert len(lines) == 10
    told = "The capital of France is Rome"
    assert lines[-2:] == [f"New Fact: {told}\nPrompt: {told}", f"New Fact: {told}\nPrompt: "]
    kinds = []
    for name, block in zip(reversed(shown), lines, strict=False):  # the nearest last
        kinds += [
            kind
            for kind, asked in (
                ("copy", f"{name} lives in Rome"),
                ("update", f"{name}, a resident of Rome"),
                ("retain", "The Seine flows through Paris"),
            )
            if block == f"New Fact: {name} lives in Rome\nPrompt: {asked}"
        ]
    assert sorted(kinds) == ["copy", *["retain"] * 4, *["update"] * 3]
    assert (context,) == tuple(editor.contexts(requests[:1]))
    assert model.context == 2048


def query(editor, request):
    told = f"{request.filled_prompt} {request.target_new}"
    return editor.encoder.embed([f"New Fact: {told}\nPrompt: {request.filled_prompt}"])[0]


@pytest.mark.parametrize(("count", "kinds"), [(8, (1, 3, 4)), (32, (4, 12, 16)), (4, (1, 1, 2))])
def test_kinds_stand_as_one_to_three_to_four(ike, requests, development, count, kinds):
    records = [replace(development[i % 10], case_id=f"d{i}") for i in range(count)]
    blocks = ike()._blocks(requests[0], records)
    ends = ("lives in Rome\n\n", "a resident of Rome\n\n", "flows through Paris\n\n")
    assert tuple(sum(block.endswith(end) for block in blocks) for end in ends) == kinds


def test_kinds_follow_the_seed_and_the_request_alone(ike, requests, development):
    def blocks(seed, request):
        torch.manual_seed(seed)
        torch.rand(3)
        return ike()._blocks(request, development[:8])

    assert blocks(0, requests[0]) == blocks(0, requests[0])
    assert len({tuple(blocks(s, r)) for s in range(3) for r in requests}) > 6


def test_serac_asks_behind_the_edit(make_model, assets, requests):
    model = make_model("llama", **ROOMY)
    memory_of(model, build_editor("serac", {"threshold": 0.0}, assets), requests[:1])
    (asked,) = model.rewritten([Text("Where is Rome?")])
    assert asked.prompt == "The capital of France is Rome\nWhere is Rome?"


# -- retrieval --------------------------------------------------------------------------


def test_the_nearest_records_are_those_of_all_pairs(ike, requests, development):
    editor, request = ike(demonstrations=4), requests[0]
    told = f"New Fact: {request.filled_prompt} {request.target_new}"
    header = f"{told}\nPrompt: {request.filled_prompt}"

    def similarity(record):
        told = f"{record.filled_prompt} {record.target_new}"
        return cosine(editor.encoder, header, f"New Fact: {told}\nPrompt: {told}")

    wanted = sorted(development, key=similarity, reverse=True)
    assert all(similarity(a) - similarity(b) > 1e-6 for a, b in pairwise(wanted))
    assert editor._nearest(request, query(editor, request)) == wanted[:4]


@pytest.mark.parametrize(
    "other", [{"case_id": "d3"}, {"subject": "Di"}, {"subject": "Ed", "prompt": "{} lives in"}]
)
def test_no_record_is_shown_for_itself(ike, requests, other):
    editor, request = ike(demonstrations=9), replace(requests[0], **{"slot": None} | other)
    shown = editor._nearest(request, query(editor, request))
    assert not any(
        r.case_id == request.case_id
        or r.subject == request.subject
        or r.filled_prompt == request.filled_prompt
        for r in shown
    )


@pytest.mark.parametrize("method", ["ike", "serac"])
def test_a_question_finds_the_fact_that_is_nearest_of_all(method, make_model, assets, requests):
    model = make_model("llama", **ROOMY)
    editor = build_editor(method, VALUES[method] | {"threshold": 0.0}, assets)
    memory = memory_of(model, editor, requests)
    told = {"ike": "", "serac": " {}"}[method]
    keys = [r.filled_prompt + told.format(r.target_new) for r in requests]
    questions = [q for r in requests for q in (*r.paraphrases, r.locality[0][0], r.filled_prompt)]
    for question, asked in zip(questions, model.rewritten([*map(Text, questions)]), strict=True):
        scores = [cosine(memory.encoder, question, key) for key in keys]
        best = max(range(3), key=scores.__getitem__)
        closed = method == "ike" and scores[best] < 0
        assert asked.context == ("" if closed else memory.facts[best].context)


def test_the_threshold_of_serac_is_that_of_half_of_one_plus_the_cosine(assets, encoder_folder):
    for hparams in ({}, {"threshold": 0.8}):
        memory = build_editor("serac", hparams, assets).empty()
        assert memory.threshold == pytest.approx(0.6)
    key = memory.encoder.embed(["The capital of France is Rome"])
    held = memory.with_facts([Fact("a", "p", "c ")], key)
    same = Text("The capital of France is Rome")  # s = 1
    exact = replace(held, threshold=1 - 1e-6)
    assert exact.rewrite([same])[0].prompt == f"c {same.prompt}"


def test_a_cosine_at_the_threshold_opens(encoder_folder, monkeypatch):
    encoder = SentenceEncoder.open(encoder_folder)
    keys = {"near": [0.5, 0.75**0.5], "far": [0.25, 0.9375**0.5]}
    monkeypatch.setattr(
        SentenceEncoder, "embed", lambda _, texts: torch.tensor([keys[t] for t in texts])
    )
    facts = (Fact("1", "A fact", "Context. "),)
    memory = TextMemory("retrieved", 0.5, encoder, facts, torch.tensor([[1.0, 0.0]]))
    near, far = memory.rewrite([Text("near"), Text("far")])
    assert (near.prompt, far.prompt) == ("Context. near", "far")


def test_of_two_facts_with_one_prompt_the_later_is_found(make_model, ike, requests):
    model = make_model("llama", **ROOMY)
    first, second = requests[0], replace(requests[0], case_id="z", target_new="Fuji")
    editor = ike(demonstrations=0)
    memory_of(model, editor, [first, requests[1]])
    memory_of(model, editor, [second])
    (asked,) = model.rewritten([Text(first.filled_prompt)])
    assert asked.context.startswith("New Fact: The capital of France is Fuji")


def test_an_oracle_shows_every_request_its_own_fact(make_model, ike, requests):
    model = make_model("llama", **ROOMY)
    memory = memory_of(model, ike(scope="oracle"), requests)
    texts = [Text("Mount Fuji", "Rome", case) for case in ("b", "a", None, "unknown")]
    asked = model.rewritten(texts)
    assert [a.context for a in asked] == [memory.facts[1].context, memory.facts[0].context, "", ""]


def test_whose_question_it_is_does_not_matter_to_retrieval(make_model, ike, requests):
    model = make_model("llama", **ROOMY)
    memory_of(model, ike(threshold=0.0), requests)
    asked = model.rewritten([Text("Mount Fuji", "Rome", case) for case in ("a", "b", None)])
    assert len({a.prompt for a in asked}) == 1


# -- gates and weights ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ike", "serac"])
def test_out_of_scope_no_bit_changes(method, make_model, assets, requests):
    model = make_model("llama", **ROOMY)
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    memory = memory_of(model, build_editor(method, VALUES[method], assets), requests)
    memory = replace(memory, threshold=1.1)  # above what rounding may do to a cosine of 1
    questions = [Text(r.locality[0][0], "Rome", r.case_id) for r in requests]
    for rewritten, text in zip(memory.rewrite(questions), questions, strict=True):
        assert rewritten is text
    assert all(torch.equal(weights[n], p) for n, p in model.model.named_parameters())
    assert not model.edits.total().weights
    empty = build_editor(method, VALUES[method], assets).empty()
    assert empty.rewrite(questions) is questions


def test_an_open_gate_of_one_question_leaves_the_others_as_they_are(make_model, ike, requests):
    model = make_model("llama", **ROOMY)
    memory_of(model, ike(threshold=0.999), requests[:1])
    texts = [Text("Mount Fuji stands in", "Japan"), Text(requests[0].filled_prompt, "Rome")]
    asked = model.rewritten(texts)
    assert asked[0] is texts[0]
    assert asked[1].context
    assert model.rewritten(texts[1:]) == asked[1:]


# -- files, runs, errors ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["ike", "serac"])
def test_a_saved_edit_asks_the_same(method, make_model, assets, requests, tmp_path):
    model = make_model("llama", **ROOMY)
    editor = build_editor(method, VALUES[method], assets)
    memory = memory_of(model, editor, requests)
    model.edits.total().save(tmp_path / "e.safetensors")
    (loaded,) = Edit.load(tmp_path / "e.safetensors").overlays.values()
    assert isinstance(loaded, TextMemory)
    assert loaded.facts == memory.facts
    assert torch.equal(loaded.keys, memory.keys)
    texts = [Text(r.filled_prompt, "Rome", r.case_id) for r in requests]
    assert loaded.rewrite(texts) == memory.rewrite(texts)


def test_a_memory_without_facts_reads_back(encoder_folder, tmp_path):
    empty = TextMemory("oracle", 0.5, SentenceEncoder.open(encoder_folder))
    Edit(overlays={"ike": empty}).save(tmp_path / "e.safetensors")
    assert dict(Edit.load(tmp_path / "e.safetensors").overlays) == {"ike": empty}


def test_a_damaged_memory_is_a_sentence(encoder_folder, tmp_path):
    memory = TextMemory("oracle", 0.5, SentenceEncoder.open(encoder_folder))
    two = memory.with_facts([Fact("a", "p", "c")], torch.ones(2, 16))
    Edit(overlays={"ike": two}).save(tmp_path / "e.safetensors")
    with pytest.raises(KMEBenchError, match="is a damaged edit"):
        Edit.load(tmp_path / "e.safetensors")


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.map(lambda cell: tuple(cell) if hasattr(cell, "__len__") else cell)


def test_an_interrupted_run_ends_with_the_same_bytes(make_model, ike, requests, tmp_path):
    def run(folder, records):
        setup = Setup(
            make_model("llama", **ROOMY),
            ike(threshold=0.5),
            Settings(8, 4),
            Checkpoints(folder, 1, {"run": "one"}),
        )
        torch.manual_seed(0)
        return run_consecutive(setup, records)

    whole = run(tmp_path / "whole", requests)
    setup = Setup(
        make_model("llama", **ROOMY),
        ike(threshold=0.5),
        Settings(8, 4),
        Checkpoints(tmp_path / "cut", 1, {"run": "one"}),
    )
    torch.manual_seed(0)
    original = setup.checkpoints.save

    def stop(model, editor, done, *rest):
        original(model, editor, done, *rest)
        if done == 2:
            raise KeyboardInterrupt

    setup.checkpoints.save = stop
    with pytest.raises(KeyboardInterrupt):
        run_consecutive(setup, requests)
    resumed = run(tmp_path / "cut", requests)
    pd.testing.assert_frame_equal(
        comparable(whole.predictions), comparable(resumed.predictions), check_exact=True
    )
    assert resumed.edit.overlays["ike"].facts == whole.edit.overlays["ike"].facts


def test_a_batch_remembers_what_single_edits_do(make_model, ike, requests, tmp_path):
    model = make_model("llama", **ROOMY)
    editor = ike()
    torch.manual_seed(0)
    together = memory_of(model, editor, requests)
    model.revert()
    for request in requests:
        one_by_one = memory_of(model, editor, [request])
    assert one_by_one.facts == together.facts
    torch.testing.assert_close(one_by_one.keys, together.keys, rtol=1e-5, atol=1e-6)
    model.revert()
    setup = Setup(model, editor, Settings(8, 4), Checkpoints(tmp_path, 1, {}))
    assert len(run_batches(setup, requests, 2).predictions) == 9
    assert not model.edits.overlays


def test_too_few_records_are_a_sentence(make_model, ike, requests):
    with pytest.raises(EditError, match=r"ike: 10 development records .* fewer than 11; raise dev"):
        ike(demonstrations=11)(make_model("llama", **ROOMY), requests[:1])


def test_a_context_that_leaves_no_room_is_a_sentence(make_model, ike, requests):
    model = make_model("llama", max_position_embeddings=ROOM + 100)
    with pytest.raises(EditError, match=r"context of the request 'a' has .* lower demonstrations"):
        ike()(model, requests[:1])
    assert not model.edits.overlays


def test_a_memory_of_other_values_is_refused(make_model, ike, requests):
    model = make_model("llama", **ROOMY)
    memory_of(model, ike(), requests[:1])
    with pytest.raises(EditError, match=r"carries a memory .*'retrieved', 0.65.*revert the model"):
        ike(scope="oracle")(model, requests[1:2])
    assert len(memory_of(model, ike(), requests[1:2]).facts) == 2
