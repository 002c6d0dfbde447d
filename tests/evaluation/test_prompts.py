"""Every way to a model's answer tokenises alike, and knows how much the model can read."""

import copy
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import MEMIT_LENGTHS, ROME_LENGTHS, prefixes, sample_contexts
from kmebench.editors.locate.covariance.texts import TextSettings, text_batches
from kmebench.edits.overlays import Text
from kmebench.errors import ModelError
from kmebench.evaluation.predict import Settings, _decode_free, _teacher_forced, predict
from kmebench.evaluation.prompts import EDIT_ROOM, askable, prompts_of, too_long
from kmebench.models.editable import EditableModel
from kmebench.models.sampling import beginning, sample
from kmebench.pipelines.one_fact import critical_shares, likeliest, says


def with_template(model, template):
    """The same weights behind a tokenizer that puts tokens around a text."""
    tokenizer = copy.deepcopy(model.tokenizer)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("E", end), special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return EditableModel(model.model, tokenizer)


def answers(model, requests, path):
    """What every path from a text to the model gives."""
    prompts = [p for i, r in enumerate(requests) for p in prompts_of(r, i)]
    prompt = requests[0].filled_prompt
    text = {"source": "file", "path": str(path)}
    written = text_batches(model, TextSettings(text=text, tokens=90, length=11, batch_size=3))
    return {
        "predictions": predict(
            model, prompts, Settings(batch_size=4, wild_max_tokens=8), decode=True
        ),
        "likeliest": likeliest(model, prompt),
        "says": says(model, prompt),
        "shares": critical_shares(model, requests[0], 3, "l2")[0].tolist(),
        "contexts": sample_contexts(model, ROME_LENGTHS, seed=0),
        "beginning": beginning(model),
        "sampled": sample(model, 3, 12, seed=1).tolist(),
        "written": [batch.input_ids.tolist() for batch in written],
    }


@pytest.mark.parametrize(("plain", "ending"), [("$A", "$A E"), ("E $A", "E $A E")])
def test_an_appended_end_changes_no_answer(plain, ending, trained, capital_requests, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(r.filled_prompt * 2 for r in capital_requests), encoding="utf-8")
    first, second = (
        answers(with_template(trained, template), capital_requests[:4], path)
        for template in (plain, ending)
    )
    assert first["says"]  # an answer, not nothing
    assert len(first["written"]) > 2
    for name, answer in first.items():
        assert str(second[name]) == str(answer), name  # as text: NaN is not NaN


def long(request, field, words):
    """The request with one text that many words make long."""
    filler = "Paris " * words
    values = {
        "prompt": f"{filler}{{}} is",
        "target_new": filler,
        "paraphrases": (filler,),
        "locality": ((filler, "x"),),
        "portability": (("x", filler),),
    }
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__}
    return EditRequest(**fields | {"case_id": field, "slot": None, field: values[field]})


@pytest.mark.parametrize(
    "field", ["prompt", "target_new", "paraphrases", "locality", "portability"]
)
def test_a_request_that_is_too_long_is_refused_or_left_out(field, make_model, requests, caplog):
    model = make_model("llama")
    mixed = [requests[0], long(requests[1], field, 70), requests[2]]
    with pytest.raises(ModelError, match=rf"^Request '{field}' cannot .* more than the 64 of the"):
        askable(model, mixed, 2, "error")
    with caplog.at_level(logging.WARNING, "kmebench"):
        assert askable(model, mixed, 2, "skip") == [requests[0], requests[2]]
    assert f"left out: Request '{field}' cannot be asked" in caplog.text
    with pytest.raises(ModelError, match="and none of the others can be asked"):
        askable(model, mixed[1:2], 2, "skip")


def test_a_target_that_the_tokenizer_does_not_know_is_refused_or_left_out(make_model):
    """Two such targets would be the same tokens, and an edit from one to the other nothing."""
    words = ["<unk>", "</s>", "Japan", "is", "in", "Asia"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    model = EditableModel(make_model("llama").model, tokenizer)
    known, unknown = (
        EditRequest(name, "Japan", "{} is in", target, locality=(("Mars is in", "space"),))
        for name, target in (("known", "Asia"), ("unknown", "Asia 東京"))
    )
    with pytest.raises(ModelError, match=r"'unknown' cannot .* does not know all of the target"):
        askable(model, [known, unknown], 2, "error")
    assert askable(model, [known, unknown], 2, "skip") == [known]


def test_without_a_limit_nothing_is_too_long(make_model, requests):
    model = make_model("llama")
    del model.model.config.max_position_embeddings
    assert askable(model, [long(requests[0], "prompt", 70)], 50, "error")


@pytest.mark.parametrize("field", ["prompt", "target_new", "paraphrases", "portability"])
@pytest.mark.parametrize("wild", [1, 7, 14])
def test_the_longest_that_is_not_too_long_can_be_asked(make_model, requests, field, wild):
    """On learned positions: one token too many is an index error."""
    model = make_model("gpt2")
    words = 1
    while not too_long(model, long(requests[0], field, words + 1), wild):
        words += 1
    assert words > 1
    longest = long(requests[0], field, words)
    prompts = [p for i, r in enumerate([longest, *requests]) for p in prompts_of(r, i)]
    predict(model, prompts, Settings(batch_size=8, wild_max_tokens=wild), decode=True)


def test_an_edit_must_leave_room_for_what_editors_put_before_it(make_model):
    model = make_model("llama")
    request = EditRequest("a", "Rome", "{} is", "Paris " * 20)
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    for room, fits in ((EDIT_ROOM, True), (EDIT_ROOM - 1, False)):
        model.model.config.max_position_embeddings = len(item.ids) + room
        assert (too_long(model, request, 1) is None) == fits


def test_a_row_without_room_for_the_longest_target_is_decoded_by_itself(make_model, requests):
    model = make_model("gpt2")
    base = EditRequest("a", "Rome", "{} is", "Paris")
    tokens = len(model.encode_prompts([base.filled_prompt])[0])
    words = next(
        n
        for n in range(1, 64)
        if len(model.encode_prompts([f"{'Paris ' * n}Rome is"])[0]) >= 64 - tokens
    )
    near = EditRequest("b", "Rome", "Paris " * (words - 1) + "{} is", "Rome")
    far = EditRequest("c", "Rome", "{} is", "Paris " * (words // 2))
    prompts = [p for r in (near, far) for p in prompts_of(r, 0)]
    texts = [Text(p.prompt, p.target) for p in prompts]
    told = _teacher_forced(model, texts, 32)
    told = [told[text] for text in texts]
    longest = max(len(answer.ids) for answer in told)
    assert len(model.encode_prompts([near.filled_prompt])[0]) + longest > 64
    together = _decode_free(model, prompts, told, Settings())
    for row, (prompt, answer) in enumerate(zip(prompts, told, strict=True)):
        assert [together[row]] == _decode_free(model, [prompt], [answer], Settings())


@pytest.mark.parametrize("lengths", [ROME_LENGTHS, MEMIT_LENGTHS])
def test_what_editors_put_before_a_prompt_fits_into_its_room(lengths, trained):
    before = [text for text in prefixes(sample_contexts(trained, lengths, seed=0)) if text]
    assert max(len(ids) for ids in trained.encode_prompts(before)) <= EDIT_ROOM
