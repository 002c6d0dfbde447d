"""The boundary between prompt and target, for every family of tokenizers."""

import copy
import itertools

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from kmebench.data.records import EditRequest, slot_of
from kmebench.errors import ModelError
from kmebench.models.encoding import (
    PASS_TOKENS,
    SubjectText,
    collate,
    encode,
    encode_pieces,
    encode_prompts,
    encode_subjects,
    length_sorted_chunks,
)
from tests.conftest import FAMILIES, TEXTS

PAIRS = [
    ("The capital of France is", "Paris"),
    ("What language is spoken in Japan?", "the Japanese of Fuji"),
    ("Mount Fuji, 3776 m, was climbed in", "1860"),
    ("Ünïcödé is", "naïve"),
]


def byte_level(bos: bool):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = ["<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return finished(inner, bos)


def sentencepiece(bos: bool):
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return finished(inner, bos)


def finished(inner, bos):
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<s>")


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def bos(request):
    return request.param


@pytest.fixture(params=[byte_level, sentencepiece], ids=["byte-level", "sentencepiece"])
def any_tokenizer(request, bos):
    return request.param(bos)


def test_target_is_what_follows_the_prompt(any_tokenizer, bos):
    for (prompt, target), item in zip(PAIRS, encode(any_tokenizer, PAIRS), strict=True):
        prompt_ids = any_tokenizer(prompt)["input_ids"]
        assert list(item.ids[: -item.n_target]) == prompt_ids
        assert list(item.ids) == any_tokenizer(f"{prompt} {target}")["input_ids"]
        text = any_tokenizer.decode(item.target_ids, skip_special_tokens=True).strip()
        if "<unk>" not in any_tokenizer.convert_ids_to_tokens(item.ids):
            assert text == target
        assert (item.ids[0] == any_tokenizer.bos_token_id) == bos


def appending(tokenizer, bos):
    """Make a tokenizer end every text with a token of its own."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>" if bos else "$A <s>", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def test_what_a_tokenizer_appends_is_no_part_of_a_text(any_tokenizer, bos):
    plain, ending = any_tokenizer, appending(copy.deepcopy(any_tokenizer), bos)
    prompts = [prompt for prompt, _ in PAIRS]
    assert ending(prompts[0])["input_ids"] == [*plain(prompts[0])["input_ids"], 0]
    assert encode_prompts(plain, prompts) == [tuple(plain(p)["input_ids"]) for p in prompts]
    assert encode_prompts(ending, prompts) == encode_prompts(plain, prompts)
    assert encode(ending, PAIRS) == encode(plain, PAIRS)
    assert encode_subjects(ending, SUBJECT_TEXTS) == encode_subjects(plain, SUBJECT_TEXTS)
    for prompt in prompts:
        for length in (2, 5, 100):
            pieces = plain(
                [prompt], truncation=True, max_length=length, return_overflowing_tokens=True
            )["input_ids"]
            assert encode_pieces(plain, prompt, length) == pieces
            assert encode_pieces(ending, prompt, length) == pieces


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_blank_at_the_end_of_a_prompt_stays(trimmed, bos):
    """Spans may leave out blanks: that of a token of nothing else is empty then."""
    tokenizer = byte_level(False)
    inner = tokenizer.backend_tokenizer
    steps = [processors.ByteLevel(trim_offsets=trimmed)]
    if bos:
        text = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
        steps.append(text)
    inner.post_processor = processors.Sequence(steps)
    (blank,) = tokenizer.convert_tokens_to_ids(["Ġ"])
    bare, one, two = encode_prompts(tokenizer, ["Paris", "Paris ", "Paris  "])
    assert one == (*bare, blank)
    assert two == (*bare, blank, blank)


def test_a_prompt_of_no_token_is_named():
    with pytest.raises(ModelError, match="The prompt '' has no token"):
        encode_prompts(byte_level(False), ["Paris", ""])


def test_the_text_of_a_request_keeps_its_slot():
    request = EditRequest("a", "Japan", "An empty {} in {} is", "Rome", slot=12 + 3)
    text = SubjectText.of(request, "So. ", "Rome")
    item = encode_subjects(byte_level(True), [text])[0]
    assert item.subject_last == last_token_by_spelling(byte_level(True), item, text)
    assert item.ids == encode(byte_level(True), [("So. An empty {} in Japan is", "Rome")])[0].ids


def test_padding_shifts_nothing():
    tokenizer = byte_level(True)
    encoded = encode(tokenizer, PAIRS)
    batch = collate(encoded, 0, torch.device("cpu"))
    for row, item in enumerate(encoded):
        mine = batch.rows == row
        assert batch.labels[mine].tolist() == list(item.target_ids)
        fed = batch.input_ids[row].tolist()
        assert [fed[p + 1] for p in batch.positions[mine][:-1]] == list(item.target_ids[:-1])
        assert fed[: len(item.ids) - 1] == list(item.ids[:-1])  # the last is only predicted
    assert batch.counts.tolist() == [item.n_target for item in encoded]


def test_a_repeated_batch_points_at_its_own_rows():
    encoded = encode(byte_level(True), PAIRS)
    once, twice = (collate(e, 0, torch.device("cpu")) for e in (encoded, encoded * 2))
    repeated = once.repeat(2)
    for name in ("input_ids", "rows", "positions", "labels", "counts"):
        assert torch.equal(getattr(repeated, name), getattr(twice, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_does_not_change_logits(family, make_model, requests):
    model = make_model(family)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    together = model.answer_logits(model.collate(encoded))
    alone = torch.cat([model.answer_logits(model.collate([item])) for item in encoded])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_without_bos_has_nothing_to_predict_from():
    tokenizer = byte_level(False)
    with pytest.raises(ModelError, match="No token to predict 'Paris' from after"):
        encode(tokenizer, [("", "Paris")])


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.encode([("The capital of Rome is", "Oslo")]),
        lambda model: model.encode_prompts(["The capital of Oslo is"]),
        lambda model: model.encode_subjects([SubjectText("", "In {}", "Oslo", None)]),
        lambda model: model.encode_pieces("The capital of Norway is Oslo", 4),
    ],
)
def test_a_token_that_the_model_lacks_is_named(use, make_model):
    model = make_model("llama")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens(["Oslo"])
    with pytest.raises(ModelError, match=r"a token 'Oslo'.* they do not belong together"):
        use(model)


def test_a_padding_token_that_the_model_lacks_is_not_fed(make_model, requests):
    """Many a tokenizer was given one for training, and the model no embedding of it."""
    model = make_model("llama")
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    expected = model.answer_logits(model.collate(model.encode(pairs)))
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    torch.testing.assert_close(model.answer_logits(model.collate(model.encode(pairs))), expected)


def test_a_prompt_must_leave_room_for_what_follows(make_model):
    model = make_model("llama")
    tokens = len(model.encode_prompts(["Paris in Rome"])[0])
    assert model.encode_prompts(["Paris in Rome"], room=64 - tokens)
    with pytest.raises(ModelError, match="with the 63 that may follow has"):
        model.encode_prompts(["Paris in Rome"], room=63)


def test_a_prompt_longer_than_the_context_is_refused(make_model):
    with pytest.raises(ModelError, match="more than the 64 of the model's context"):
        make_model("llama").encode([("Paris " * 70, "Rome")])


def chunk_cost(lengths, chunks):
    return sum(PASS_TOKENS + len(chunk) * max(lengths[i] for i in chunk) for chunk in chunks)


@pytest.mark.parametrize("seed", range(5))
def test_chunks_are_the_cheapest_cut_of_the_sorted_items(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (9,), generator=generator).tolist()
    chunks = list(length_sorted_chunks(lengths, 4))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(9))
    assert [lengths[i] for chunk in chunks for i in chunk] == sorted(lengths)
    assert max(len(chunk) for chunk in chunks) <= 4
    order = sorted(range(9), key=lambda i: lengths[i])
    costs = []
    for cuts in itertools.product([False, True], repeat=8):  # every way to cut nine items
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
        parts = [order[a:b] for a, b in itertools.pairwise(places)]
        if max(len(part) for part in parts) <= 4:
            costs.append(chunk_cost(lengths, parts))
    assert chunk_cost(lengths, chunks) == min(costs)


def test_no_items_make_no_chunks():
    assert list(length_sorted_chunks([], 4)) == []


SUBJECT_TEXTS = [
    SubjectText("", "The capital of {} is", "France", "Paris"),
    SubjectText("The Seine flows. ", "The capital of {} is", "France", "Rome"),
    SubjectText("", "{} is a", "Mount Fuji", None),
    SubjectText("In Japan, Japan. ", "Japan and {}, in Japan", "Japan", "Japan"),  # the slot counts
    SubjectText("", "{}'s language is", "Italy", "Japanese"),
    SubjectText("", "The Mount {}", "Fuji", "Japan"),  # the subject ends the prompt
    SubjectText("{} {", "In {}, {} is", "Japan", "Rome", 3),  # braces elsewhere
    SubjectText("", "In {}, {} is", "Japan", "Rome", 7),
]


def last_token_by_spelling(tokenizer, item, text):
    """Walk along the tokens' own spellings, not their offsets."""
    head = text.prefix + text.prompt[: slot_of(text.prompt, text.slot)]
    pieces = tokenizer.convert_ids_to_tokens(item.ids)
    if pieces[0] == "<s>":
        before, pieces = 1, pieces[1:]
    else:
        before = 0
    if isinstance(tokenizer.backend_tokenizer.model, models.BPE):  # one character for each byte
        end = len((head + text.subject).encode())
    else:  # a blank is put before the text
        end = 1 + len(head + text.subject)
    reached = 0
    for index, piece in enumerate(pieces):
        reached += len(piece)
        if reached >= end:
            return before + index
    raise AssertionError("the subject lies behind the text")


def test_the_subjects_last_token_is_the_one_that_spells_its_end(any_tokenizer):
    encoded = encode_subjects(any_tokenizer, SUBJECT_TEXTS)
    checked = 0
    for text, item in zip(SUBJECT_TEXTS, encoded, strict=True):
        if "<unk>" in any_tokenizer.convert_ids_to_tokens(item.ids):
            continue  # its spelling is lost
        assert item.subject_last == last_token_by_spelling(any_tokenizer, item, text)
        checked += 1
    assert checked >= 4


def test_a_subject_that_ends_in_a_character_of_several_tokens_has_the_last_of_them():
    tokenizer = byte_level(True)
    text = SubjectText("Ünï ", "Of {} is", "Ünïcödé", "naïve")
    item = encode_subjects(tokenizer, [text])[0]
    assert item.subject_last == last_token_by_spelling(tokenizer, item, text)
    assert tokenizer.decode(item.ids[: item.subject_last + 1]).endswith("Of Ünïcödé")


def test_subjects_change_nothing_about_tokens_and_targets(any_tokenizer):
    texts = [t for t in SUBJECT_TEXTS if t.target is not None]
    pairs = []
    for t in texts:
        slot = slot_of(t.prompt, t.slot)
        filled = t.prefix + t.prompt[:slot] + t.subject + t.prompt[slot + 2 :]
        pairs.append((filled, t.target))
    plain = encode(any_tokenizer, pairs)
    found = encode_subjects(any_tokenizer, texts)
    assert [(e.ids, e.n_target) for e in found] == [(e.ids, e.n_target) for e in plain]


def test_without_a_target_nothing_is_target(any_tokenizer):
    item = encode_subjects(any_tokenizer, [SubjectText("", "{} is a", "Japan", None)])[0]
    assert item.n_target == 0
    assert item.target_ids == ()
    assert item.subject_last < len(item.ids) - 1


def test_a_prompt_without_a_slot_is_named():
    for prompt, complaint in (("The capital is", r"no \{\}"), ("{} or {} is", r"\{\} 2 times")):
        with pytest.raises(ModelError, match=f"'France' has no place.*{prompt}' holds {complaint}"):
            encode_subjects(byte_level(True), [SubjectText("", prompt, "France", "Rome")])


def test_a_subject_that_the_tokenizer_drops_is_named():
    tokenizer = byte_level(True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    text = SubjectText("", "The capital of {} is", "\u200b", "Rome")
    with pytest.raises(ModelError, match=r"end of the subject '\\u200b' in the prompt 'The cap"):
        encode_subjects(tokenizer, [text])


def test_a_subjects_text_longer_than_the_context_is_refused(make_model):
    with pytest.raises(ModelError, match="more than the 64 of the model's context"):
        make_model("llama").encode_subjects([SubjectText("", "{} is", "Japan", "Rome " * 70)])
