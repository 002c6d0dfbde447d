"""Covariance: against literal float64 sums over single texts; resumption; refusals."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import processors

from kmebench.editors.locate.covariance import stage
from kmebench.editors.locate.covariance.keys import Sampled
from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.covariance.texts import TextSettings, text_batches
from kmebench.errors import ConfigError, DataError, EditError, KMEBenchError
from kmebench.models.sampling import beginning, sample
from tests.conftest import SOME_FAMILIES, TEXTS, in_turn

LAYERS = (0, 2)


@pytest.fixture
def text(tmp_path):
    """Paragraphs of different lengths, one of them over two lines."""
    path = tmp_path / "text.txt"
    paragraphs = [*TEXTS, f"{TEXTS[0]}\n{TEXTS[3]} " * 3, "Rome"] * 3
    path.write_text("\n\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path, [p.strip() for p in paragraphs]


def settings(path=None, **changes):
    source = {"source": "self"} if path is None else {"source": "file", "path": str(path)}
    values = {"tokens": 150, "length": 20, "batch_size": 4, "seed": 0, "text": source}
    return TextSettings(**values | changes)


def literal_sum(model, layer, texts):
    """Σ k kᵀ over all positions of token lists, each run alone through the whole model."""
    seen = []
    module = model.ffn[layer].value.module
    handle = module.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in texts:
            model.model(input_ids=torch.tensor([ids]))
    handle.remove()
    width = model.ffn[layer].value.width
    total = torch.zeros(width, width, dtype=torch.float64)
    for keys in seen:
        for key in keys:
            total += torch.outer(key, key).double()
    return total


def tokenised(model, paragraphs, length, tokens):
    """The pieces of a text, by hand."""
    pieces = []
    for paragraph in paragraphs:
        ids = model.tokenizer(paragraph)["input_ids"]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    kept = []
    for ids in pieces:
        kept.append(ids[: tokens - sum(map(len, kept))])
    return [ids for ids in kept if ids]


@pytest.mark.parametrize(("family", "block"), in_turn([4096, 7]))
def test_covariance_of_a_text_are_the_mean_of_outer_products(
    family, block, make_model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "_BLOCK", block)
    model = make_model(family)
    path, paragraphs = text
    measure_covariance(tmp_path / "c.safetensors", model, LAYERS, settings(path))
    covariance = Covariances.open(tmp_path / "c.safetensors")
    pieces = tokenised(model, paragraphs, 20, 150)
    assert sum(map(len, pieces)) == covariance.tokens == 150
    assert len({len(ids) for ids in pieces}) > 3  # there is padding to leave out
    for layer in LAYERS:
        expected = literal_sum(model, layer, pieces) / 150
        assert torch.equal(covariance.of(layer), covariance.of(layer).T)
        torch.testing.assert_close(covariance.of(layer), expected.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_covariance_of_sampled_text_are_those_of_reading_it(family, make_model, tmp_path):
    model = make_model(family)
    measure_covariance(tmp_path / "c.safetensors", model, LAYERS, settings())
    covariance = Covariances.open(tmp_path / "c.safetensors")
    batches = list(text_batches(model, settings()))
    assert [(b.rows, b.length) for b in batches] == [(4, 20), (3, 20), (1, 10)]
    written = [ids for b in batches for ids in sample(model, b.rows, b.length, b.seed).tolist()]
    assert covariance.tokens == 150 == sum(map(len, written))
    assert len({tuple(ids) for ids in written}) == 8
    assert all(ids[0] == model.tokenizer.bos_token_id for ids in written)
    for layer in LAYERS:
        expected = literal_sum(model, layer, written) / 150
        torch.testing.assert_close(covariance.of(layer), expected.float(), rtol=1e-6, atol=1e-9)


def test_sampling_follows_the_models_distribution(make_model):
    model = make_model("llama")
    rows = 40_000
    second = sample(model, rows, 2, seed=3)[:, 1]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([beginning(model)])).logits[0, -1]
    expected = rows * logits.softmax(dim=0)
    seen = torch.bincount(second, minlength=len(expected)).double()
    often = expected >= 5
    square = ((seen - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    assert freedom > 10
    assert abs(float(square) - freedom) < 5 * (2 * freedom) ** 0.5  # chi-square, five sigma


def test_sampling_never_leaves_the_vocabulary(make_model, monkeypatch):
    model = make_model("gpt2", torch.float32)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(*shape))
    ids = sample(model, 3, 4, seed=0)
    assert ids.max() < model.model.config.vocab_size


def test_a_text_begins_with_what_the_tokenizer_puts_there(make_model):
    model = make_model("llama")
    assert beginning(model) == [model.tokenizer.bos_token_id]
    model.tokenizer = copy.deepcopy(model.tokenizer)
    for template, expected in (("$A c", [0]), ("a b $A c", [5, 6]), ("a b $A", [5, 6])):
        model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("a", 5), ("b", 6), ("c", 7)]
        )
        assert beginning(model) == expected
    assert sample(model, 2, 3, seed=0)[:, :2].tolist() == [[5, 6], [5, 6]]


def test_texts_are_never_longer_than_the_context(make_model):
    model = make_model("gpt2")
    (batch,) = text_batches(model, settings(tokens=64, length=1000))
    assert (batch.rows, batch.length) == (1, 64)


def test_other_seeds_and_other_batches_are_other_texts(make_model):
    model = make_model("llama")
    seeds = [b.seed for seed in range(3) for b in text_batches(model, settings(seed=seed))]
    assert len(set(seeds)) == 9
    assert sample(model, 2, 8, 0).tolist() == sample(model, 2, 8, 0).tolist()
    assert sample(model, 2, 8, 0).tolist() != sample(model, 2, 8, 1).tolist()


def run_and_kill(path, model, chosen, batches):
    """Run a stage that dies after so many batches."""
    real = Sampled.feed if chosen.text["source"] == "self" else stage.Sums.settle

    class KilledError(BaseException):
        pass

    count = 0

    def settle(sums):
        nonlocal count
        real(sums)
        count += 1
        if count > batches:
            raise KilledError

    real = stage.Sums.settle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Sums, "settle", settle)
        with pytest.raises(KilledError):
            measure_covariance(path, model, LAYERS, chosen)


@pytest.mark.parametrize("source", ["self", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_pass_ends_with_the_same_bytes(source, dtype, make_model, text, tmp_path):
    model = make_model("llama", dtype)
    chosen = settings(None if source == "self" else text[0], tokens=180, batch_size=2)
    measure_covariance(tmp_path / "whole.safetensors", model, LAYERS, chosen)
    measure_covariance(tmp_path / "again.safetensors", model, LAYERS, chosen)
    killed = tmp_path / "killed.safetensors"
    run_and_kill(killed, model, chosen, batches=3)
    partial = tmp_path / "killed.safetensors.partial"
    assert partial.is_file()
    assert not killed.exists()
    with safe_open(str(partial), framework="pt") as stream:
        assert 0 < int(stream.metadata()["tokens"]) < 180
    fed = []
    with pytest.MonkeyPatch.context() as patch:
        real = stage.Sums.settle
        patch.setattr(stage.Sums, "settle", lambda sums: (fed.append(1), real(sums)))
        measure_covariance(killed, model, LAYERS, chosen)
    assert len(fed) == len(list(text_batches(model, chosen))) - 3  # what was done is not repeated
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert killed.read_bytes() == whole == (tmp_path / "again.safetensors").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("change", ["seed", "layers", "weights", "code", "broken"])
def test_a_state_of_another_pass_is_not_resumed(change, make_model, tmp_path):
    model = make_model("gptj", torch.float32)
    killed = tmp_path / "killed.safetensors"
    run_and_kill(killed, model, settings(), batches=2)
    chosen, layers, code = settings(), LAYERS, {}
    if change == "seed":
        chosen = settings(seed=1)
    elif change == "layers":
        layers = (0, 1)
    elif change == "weights":
        model.ffn[0].value.weight.data[0, 0] += 1.0
    elif change == "code":
        code = {"stage.py": "0"}
    else:
        (tmp_path / "killed.safetensors.partial").write_bytes(b"half a file")
    measure_covariance(tmp_path / "whole.safetensors", model, layers, chosen, code=code)
    measure_covariance(killed, model, layers, chosen, code=code)
    assert killed.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_model_is_left_as_it_was(make_model, text, tmp_path):
    model = make_model("gpt2")
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    for chosen in (settings(), settings(text[0])):
        measure_covariance(tmp_path / "c.safetensors", model, LAYERS, chosen)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    assert not any(f.value.module._forward_pre_hooks for f in model.ffn)


def test_a_short_text_is_read_to_its_end(make_model, text, tmp_path):
    model = make_model("llama", torch.float32)
    path, paragraphs = text
    measure_covariance(tmp_path / "c.safetensors", model, LAYERS, settings(path, tokens=10_000))
    tokens = sum(len(model.tokenizer(p)["input_ids"]) for p in paragraphs)
    assert Covariances.open(tmp_path / "c.safetensors").tokens == tokens


def test_too_few_tokens_are_refused_unless_forced(make_model, tmp_path):
    model = make_model("llama", torch.float32)
    path = tmp_path / "c.safetensors"
    with pytest.raises(ConfigError, match=r"23 tokens cannot fill .* 24; .* covariance\.force"):
        measure_covariance(path, model, LAYERS, settings(tokens=23))
    assert not path.exists()
    measure_covariance(path, model, LAYERS, settings(tokens=23), force=True)
    assert Covariances.open(path).tokens == 23
    measure_covariance(path, model, LAYERS, settings(tokens=24))
    assert Covariances.open(path).tokens == 24


def test_few_tokens_are_told_once(make_model, text, tmp_path, caplog):
    """Asked for, or left when the text has ended; M = 24."""
    model = make_model("llama", torch.float32)
    held = sum(len(model.tokenizer(p)["input_ids"]) for p in text[1][:4])
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(text[1][:4]), encoding="utf-8")
    assert 24 < held < 96
    cases = [(settings(tokens=95), 95), (settings(tokens=96), None), (settings(short), held)]
    for chosen, few in cases:
        caplog.clear()
        measure_covariance(tmp_path / "c.safetensors", model, LAYERS, chosen)
        told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(told) == (few is not None)
        assert all(f"{few} tokens" in t and "covariance.tokens to 96 or more" in t for t in told)


def test_a_text_that_turns_out_too_short_is_refused_unless_forced(make_model, tmp_path):
    model = make_model("llama", torch.float32)
    text = tmp_path / "short.txt"
    text.write_text("Rome", encoding="utf-8")
    path = tmp_path / "c.safetensors"
    with pytest.raises(ConfigError, match="cannot fill a matrix of width 24"):
        measure_covariance(path, model, LAYERS, settings(text))
    measure_covariance(path, model, LAYERS, settings(text), force=True)
    text.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no tokens"):
        measure_covariance(path, model, LAYERS, settings(text), force=True)


def test_a_layer_that_does_not_exist_is_refused(make_model, tmp_path):
    with pytest.raises(ConfigError, match=r"layers \[1, 3\] .* 0 to 2; set the layers of"):
        measure_covariance(tmp_path / "c.safetensors", make_model("gptj"), (3, 1), settings())


def test_covariance_of_no_layer_are_refused(make_model, tmp_path):
    with pytest.raises(ConfigError, match="no layer is asked for; an experiment or comparison"):
        measure_covariance(tmp_path / "c.safetensors", make_model("gptj"), (), settings())


@pytest.mark.parametrize("from_file", [True, False])
def test_a_further_layer_leaves_the_bytes_of_the_others(from_file, make_model, text, tmp_path):
    chosen = settings(text[0]) if from_file else settings()
    few, more = tmp_path / "few.safetensors", tmp_path / "more.safetensors"
    measure_covariance(few, make_model("llama", torch.float32), (1,), chosen)
    measure_covariance(more, make_model("llama", torch.float32), (0, 1, 2), chosen)
    assert Covariances.open(more).of(1).equal(Covariances.open(few).of(1))


def test_a_layer_that_was_not_made_is_named_with_its_file(make_model, tmp_path):
    path = tmp_path / "c.safetensors"
    measure_covariance(path, make_model("gptj", torch.float32), LAYERS, settings())
    covariance = Covariances.open(path)
    assert covariance.layers == LAYERS
    assert covariance.text == {"source": "self"}
    with pytest.raises(EditError, match=r"c\.safetensors holds no .* layer 1, only of 0, 2; edit"):
        covariance.of(1)


def test_another_file_is_refused(make_model, tmp_path):
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(KMEBenchError, match=r"not a file of format kmebench\.moments\.v2"):
        Covariances.open(tmp_path / "x.safetensors")


def test_a_file_that_is_missing_or_no_text_is_named(make_model, tmp_path):
    model = make_model("llama", torch.float32)
    path = tmp_path / "text.txt"
    with pytest.raises(DataError, match=r"there is no file .*text\.txt"):
        list(text_batches(model, settings(path)))
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"text\.txt is not UTF-8"):
        list(text_batches(model, settings(path)))
    with pytest.raises(DataError, match=r"text\.path: .* cannot be read \(Is a directory"):
        list(text_batches(model, settings(tmp_path)))


DATASET = {
    "source": "dataset",
    "name": "owner/texts",
    "config": "en",
    "split": "train",
    "column": "text",
    "revision": "abc",
}


class Streamed(list):
    """Stands in for a streamed data set of the hub."""

    def shuffle(self, seed, buffer_size):
        assert buffer_size > 1
        return Streamed(self[seed:] + self[:seed])


def stand_in(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_a_data_set_is_streamed_as_configured(make_model, monkeypatch):
    def load(name, config, *, split, revision, streaming):
        assert (name, config, split, revision) == ("owner/texts", "en", "train", "abc")
        assert streaming
        return Streamed([{"text": text, "url": ""} for text in TEXTS])

    stand_in(monkeypatch, load)
    model = make_model("llama", torch.float32)
    chosen = settings(text=DATASET, seed=1, length=64, batch_size=1, tokens=10_000)
    rows = [b.input_ids[0].tolist() for b in text_batches(model, chosen)]
    assert sorted(rows) == sorted(model.tokenizer(t)["input_ids"] for t in TEXTS)
    wrong = settings(text=DATASET | {"column": "body"})
    with pytest.raises(DataError, match=r"owner/texts has no column 'body'; it has text, url"):
        list(text_batches(model, wrong))
    stand_in(monkeypatch, lambda *_, **__: Streamed([{"text": None}]))
    with pytest.raises(DataError, match=r"'text' of owner/texts holds a NoneType, expected texts"):
        list(text_batches(model, chosen))


def test_a_data_set_that_cannot_be_had_ends_in_a_sentence(make_model, monkeypatch):
    model = make_model("llama", torch.float32)

    def load(*_, **__):
        raise ValueError("unknown revision")

    stand_in(monkeypatch, load)
    with pytest.raises(DataError, match=r"owner/texts cannot be streamed: unknown revision"):
        list(text_batches(model, settings(text=DATASET)))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install datasets"):
        list(text_batches(model, settings(text=DATASET)))
