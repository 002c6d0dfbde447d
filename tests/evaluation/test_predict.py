"""Predictions against plain, one-by-one computation with the bare Hugging Face model."""

import math

import pytest
import torch

from kmebench.errors import DataError
from kmebench.evaluation import frames
from kmebench.evaluation.frames import (
    beside_original,
    original_frame,
    predicted_frame,
    write_frame,
    write_original,
)
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt, prompts_of
from kmebench.evaluation.schema import ORIGINAL
from kmebench.io.checked_files import read_parquet
from kmebench.io.parts import Parts
from kmebench.memory import NoMemoryError
from tests.conftest import FAMILIES


def plain_teacher_forcing(model, prompt, target):
    start = model.tokenizer(prompt)["input_ids"]
    whole = model.tokenizer(f"{prompt} {target}")["input_ids"]
    target_ids = whole[len(start) :]
    logits = model.model(input_ids=torch.tensor([whole])).logits[0].float()
    log_probs = logits.log_softmax(-1)[len(start) - 1 : -1]
    gold = log_probs.gather(1, torch.tensor(target_ids)[:, None])
    return target_ids, log_probs.argmax(-1).tolist(), float(gold.mean())


def plain_greedy(model, prompt, n_tokens):
    ids = model.tokenizer(prompt)["input_ids"]
    for _ in range(n_tokens):
        ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n_tokens:]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_predictions_equal_plain_ones(family, make_model, requests):
    model = make_model(family, torch.float32)
    prompts = [p for i, r in enumerate(requests) for p in prompts_of(r, i)]
    columns = predict(model, prompts, Settings(batch_size=4, wild_max_tokens=5), decode=True)
    for row, p in enumerate(prompts):
        target_ids, argmax, _ = plain_teacher_forcing(model, p.prompt, p.target)
        assert columns["target_ids"][row] == target_ids
        assert columns["ids"][row] == argmax
        for column, target in (
            ("target_new_logprob", p.target_new),
            ("target_true_logprob", p.target_true),
        ):
            expected = plain_teacher_forcing(model, p.prompt, target)[2]
            assert columns[column][row] == pytest.approx(expected, abs=1e-4)
        greedy = plain_greedy(model, p.prompt, len(target_ids))
        end = model.tokenizer.eos_token_id
        if end not in greedy:
            assert columns["free_ids"][row] == greedy


def test_a_trained_model_answers_in_its_own_words(trained, capital_requests):
    frame = original_frame(trained, capital_requests, Settings())
    edits = frame[frame["kind"] == "portability"]
    assert edits["wild"].notna().all()
    asked = frame[frame["kind"] == "edit"]
    answers = [trained.tokenizer.decode(ids).strip() for ids in asked["free_ids"]]
    # The free answer is cut at the length of target_new: compare what both hold.
    truth = [r.target_true for r in capital_requests]
    assert all(t.startswith(a) or a.startswith(t) for a, t in zip(answers, truth, strict=True))
    assert (asked["target_true_logprob"] > asked["target_new_logprob"]).all()


def test_what_teacher_forcing_settles_is_not_decoded_again(trained, capital_requests, monkeypatch):
    asked = [(r.filled_prompt, f"{r.target_new} {r.target_true}") for r in capital_requests]
    for request in capital_requests:
        own = plain_greedy(trained, request.filled_prompt, 3)
        asked.append((request.filled_prompt, trained.tokenizer.decode(own).strip()))
    prompts = [Prompt(text, 0, "edit", text, target, None, None) for text, target in asked]
    decoded = []
    usual = trained.generate
    monkeypatch.setattr(
        trained, "generate", lambda ids, *a, **k: decoded.extend(ids) or usual(ids, *a, **k)
    )
    columns = predict(trained, prompts, Settings(wild_max_tokens=1), decode=True)
    lengths = [len(ids) for ids in columns["target_ids"]]
    settled = [
        said[:-1] == told[:-1]
        for said, told in zip(columns["ids"], columns["target_ids"], strict=True)
    ]
    assert max(n for n, done in zip(lengths, settled, strict=True) if done) > 1
    assert 0 < len(decoded) - len(asked) == settled.count(False)  # each once, in its own words too
    for row, (prompt, _) in enumerate(asked):
        assert columns["free_ids"][row] == plain_greedy(trained, prompt, lengths[row])


def test_generation_stops_per_row_and_does_not_depend_on_its_batch(trained):
    texts = ["The capital of France is", "What is the capital of Japan?", "The capital of Peru is"]
    prompts = [Prompt("x", 0, "edit", text, "Paris", None, None) for text in texts]
    together = predict(trained, prompts, Settings(wild_max_tokens=12), decode=True)["wild"]
    for prompt, wild in zip(prompts, together, strict=True):
        alone = predict(trained, [prompt], Settings(wild_max_tokens=12), decode=True)["wild"]
        assert alone == [wild]


@pytest.mark.parametrize(
    ("said", "target", "answer"),
    [
        (" 1. FC Nord. It is", "1. FC Nord", "1. FC Nord"),
        (" 1. FC Nord. It is", "Rome", "1"),
        (" J. K. Ro. It is", "Rome", "J. K. Ro"),
    ],
)
def test_decoding_does_not_stop_inside_the_target(said, target, answer, trained, monkeypatch):
    """The model would say `said`, token by token, for as long as it is not stopped."""
    words = trained.tokenizer(said, add_special_tokens=False)["input_ids"]

    def says(model, prompts, n_tokens, stopping=None, prefix=None):
        rows = torch.tensor([list(prompts[0]) for _ in prompts])
        start = rows.shape[1]
        for token in words:
            if stopping is None or not all(stopping[0](rows, None)):
                rows = torch.cat([rows, torch.full((len(rows), 1), token)], dim=1)
        return rows[:, start:]

    monkeypatch.setattr("kmebench.models.editable.EditableModel.generate", says)
    prompt = Prompt("x", 0, "edit", "The capital of France is", target, None, None)
    assert predict(trained, [prompt], Settings(), decode=True)["wild"] == [answer]


def test_missing_true_target_gives_nan(trained):
    prompt = Prompt("x", 0, "edit", "The capital of France is", "Rome", "Rome", None)
    columns = predict(trained, [prompt], Settings(), decode=False)
    assert math.isnan(columns["target_true_logprob"][0])
    assert columns["wild"] == [None]


def test_predictions_that_were_interrupted_go_on_to_the_same_bytes(
    trained, capital_requests, tmp_path, monkeypatch
):
    requests, settings = capital_requests[:3], Settings(wild_max_tokens=3)
    write_original(Parts(tmp_path / "whole", {}), trained, requests, settings)
    write_frame(original_frame(trained, requests, settings), ORIGINAL, tmp_path / "at once")
    monkeypatch.setattr(frames, "_REQUESTS_AT_ONCE", 2)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "predicted_frame", only_from(0))
        with pytest.raises(RuntimeError):
            write_original(Parts(tmp_path / "parts", {}), trained, requests, settings)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "predicted_frame", only_from(2))
        write_original(Parts(tmp_path / "parts", {}), trained, requests, settings)
    whole = (tmp_path / "whole").read_bytes()
    assert whole == (tmp_path / "at once").read_bytes()
    assert read_parquet(tmp_path / "parts").equals(read_parquet(tmp_path / "whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["at once", "parts", "whole"]


def only_from(position):
    """Predict the prompts of this request and those beside it; of no others."""

    def predicted(model, prompts, settings, **options):
        if prompts[0].position != position:
            raise RuntimeError("power cut")
        return predicted_frame(model, prompts, settings, **options)

    return predicted


def test_join_puts_the_unedited_model_beside_and_names_a_missing_prompt(trained, capital_requests):
    settings = Settings()
    original = original_frame(trained, capital_requests[:2], settings)
    prompts = [p for i, r in enumerate(capital_requests[:2]) for p in prompts_of(r, i)]
    after = predicted_frame(trained, prompts, settings, decode=False)
    joined = beside_original(after, original)
    assert list(map(list, joined["before_ids"])) == joined["after_ids"].map(list).tolist()
    assert joined["free_before_ids"].notna().all()
    assert joined["free_after_ids"].isna().all()
    few = original[original["case_id"] == "France"]
    missing = r"no prediction for edit prompt 'The capital of Italy.*; delete here/few and run"
    with pytest.raises(DataError, match=missing):
        beside_original(after, few, "here/few")


def out_of_memory_beyond(model, rows, monkeypatch):
    """Let a model be asked about ``rows`` texts at once, and no more."""
    ask = model.answer_logits

    def limited(batch, *behind):
        if len(batch.counts) > rows:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return ask(batch, *behind)

    monkeypatch.setattr(model, "answer_logits", limited)


def test_out_of_memory_half_the_batch_is_tried(make_model, requests, monkeypatch, caplog):
    model = make_model("gptj", torch.float64)
    prompts = [p for i, r in enumerate(requests) for p in prompts_of(r, i)]
    expected = predict(model, prompts, Settings(batch_size=4), decode=False)
    out_of_memory_beyond(model, 4, monkeypatch)
    found = predict(model, prompts, Settings(batch_size=8), decode=False)
    assert found["ids"] == expected["ids"]
    assert "while asking the model: trying 4 at once" in caplog.text
    out_of_memory_beyond(model, 3, monkeypatch)
    with pytest.raises(NoMemoryError, match=r"4 at once \(.*2.00 GiB\): lower evaluation.batch"):
        predict(model, prompts, Settings(batch_size=8), decode=False)
