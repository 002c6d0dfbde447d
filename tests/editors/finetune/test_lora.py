"""LoRA: training against a dense oracle, one adapter along edits, and nothing left behind."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.edits.weights import LowRank, WeightDelta
from kmebench.errors import ConfigError, EditError
from kmebench.evaluation.predict import Settings
from kmebench.models.layouts import adapted_modules, layout_of
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches
from tests.conftest import FAMILIES, in_turn
from tests.pipelines.runs import killed_and_resumed

SCALE = 6 / 2
HPARAMS = {"rank": 2, "alpha": 6, "dropout": 0.0, "learning_rate": 0.01, "steps": 4}
HPARAMS |= {"tolerance": 0.0}
SETTINGS = Settings(wild_max_tokens=1)


def lora(**hparams):
    return build_editor("lora", HPARAMS | hparams, {})


def names_of(model):
    return adapted_modules(model.model, layout_of(model.model.config))


def product(family, a, b):
    """(alpha / r) B A as the family stores weights."""
    return SCALE * (b @ a).T if family == "gpt2" else SCALE * b @ a


def dense_lora(model, family, base, factors, requests, steps):
    """Adam on A and B through whole weights W0 + (alpha / r) B A; the trained factors."""
    factors = {
        name: [factor.clone().requires_grad_() for factor in pair] for name, pair in factors.items()
    }
    adam = torch.optim.Adam([f for pair in factors.values() for f in pair], lr=0.01)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    for _ in range(steps):
        adam.zero_grad()
        for item in encoded:
            weights = {
                f"{name}.weight": base[f"{name}.weight"] + product(family, *pair)
                for name, pair in factors.items()
            }
            logits = torch.func.functional_call(
                model.model, weights, kwargs={"input_ids": torch.tensor([item.ids])}
            ).logits[0, -item.n_target - 1 : -1]
            (cross_entropy(logits, torch.tensor(item.target_ids)) / len(encoded)).backward()
        adam.step()
    return {name: [f.detach() for f in pair] for name, pair in factors.items()}


def factors_of(editor):
    state = editor.state_dict()
    names = {key.split("|")[0] for key in state}
    return {name: [state[f"{name}|A"], state[f"{name}|B"]] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_trains_as_dense_low_rank_weights_do(family, make_model, requests):
    model = make_model(family)
    base = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    torch.manual_seed(1)
    untrained = lora(steps=0)
    untrained.edit(model, requests)
    start = factors_of(untrained)
    assert all(a.any() and not b.any() for a, b in start.values())
    expected = dense_lora(model, family, base, start, requests, 4)
    torch.manual_seed(1)
    model.apply(lora(micro_batch=2).edit(model, requests))
    for name in names_of(model):
        torch.testing.assert_close(
            model.parameter(f"{name}.weight").detach(),
            base[f"{name}.weight"] + product(family, *expected[name]),
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_goes_on_from_where_it_was_and_counts_once(family, make_model, requests):
    model = make_model(family)
    base = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    start, parts = {}, {}
    for name in names_of(model):
        shape = base[f"{name}.weight"].shape
        n_out, n_in = reversed(shape) if family == "gpt2" else shape
        a = 0.1 * torch.randn(2, n_in, generator=generator, dtype=torch.float64)
        b = 0.1 * torch.randn(n_out, 2, generator=generator, dtype=torch.float64)
        start[name] = [a, b]
        u, v = (a.T, SCALE * b.T) if family == "gpt2" else (SCALE * b, a)
        parts[f"{name}.weight"] = LowRank(u, v)
    model.apply(WeightDelta(parts))
    editor = lora()
    editor.load_state_dict(
        {f"{n}|{f}": t for n, pair in start.items() for f, t in zip("AB", pair, strict=True)}
    )
    expected = dense_lora(model, family, base, start, requests[:1], 4)
    model.apply(editor.edit(model, requests[:1]))
    for name in names_of(model):
        torch.testing.assert_close(
            model.parameter(f"{name}.weight").detach(),
            base[f"{name}.weight"] + product(family, *expected[name]),
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_along_consecutive_edits_the_rank_stays_that_of_one_adapter(family, make_model, requests):
    model, editor = make_model(family), lora(dropout=0.1)
    for request in requests:
        delta = editor.edit(model, [request])
        model.apply(delta)
    total = model.edits.total().weights
    assert set(total) == {f"{name}.weight" for name in names_of(model)}
    for name, (a, b) in factors_of(editor).items():
        weight = f"{name}.weight"
        change = total[weight].dense(model.parameter(weight).shape)
        torch.testing.assert_close(change, product(family, a, b), rtol=0, atol=1e-10)
        singular = torch.linalg.svdvals(change)
        assert singular[1] > 1e-6
        assert singular[2:].max() < 1e-10
        # One call's change alone has up to twice that rank.
        assert torch.linalg.svdvals(delta[weight].dense(change.shape))[3] > 1e-6


@pytest.mark.parametrize(("family", "failing"), in_turn([False, True]))
def test_adapters_leave_nothing_behind(family, failing, make_model, requests):
    model, editor = make_model(family), lora(dropout=0.1)
    model.apply(editor.edit(model, requests[:1]))
    modules = list(model.model.named_modules())
    parameters = {n: (p, p.detach().clone()) for n, p in model.model.named_parameters()}
    attributes = set(vars(model.model))
    if failing:
        broken = lora(learning_rate=1e300)
        broken.load_state_dict(editor.state_dict())
        with pytest.raises(
            EditError, match=r"lora: the loss of request 'b' .* lower learning_rate"
        ):
            broken.edit(model, requests[1:2])
    else:
        editor.edit(model, requests[1:2])
    assert [(n, id(m)) for n, m in model.model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert set(vars(model.model)) == attributes
    assert [n for n, _ in model.model.named_parameters()] == list(parameters)
    for name, parameter in model.model.named_parameters():
        same, before = parameters[name]
        assert parameter is same is model.parameter(name)
        assert torch.equal(parameter, before)
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for _, m in modules)
    assert not any(m.training for _, m in modules)


def test_the_same_seed_gives_the_same_bytes_and_dropout_acts(make_model, requests):
    model = make_model("llama", torch.float32)

    def edited(seed, **hparams):
        torch.manual_seed(seed)
        delta = lora(**hparams).edit(model, requests)
        return torch.cat([f.flatten() for part in delta.values() for f in part.factors()])

    assert torch.equal(edited(0, dropout=0.1), edited(0, dropout=0.1))
    assert not torch.equal(edited(0, dropout=0.1), edited(1, dropout=0.1))
    assert not torch.equal(edited(0, dropout=0.1), edited(0))


def test_an_edit_takes_one_number_from_the_global_generator(make_model, requests):
    model = make_model("llama", torch.float32)
    torch.manual_seed(3)
    torch.randint(2**62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    lora(dropout=0.1).edit(model, requests)
    assert torch.equal(torch.get_rng_state(), expected)


def test_training_is_seeded_on_every_device_by_the_sessions_generator(make_model, requests):
    model, editor, seen = make_model("llama", torch.float32), lora(), []
    editor._train = lambda *_: seen.append(torch.initial_seed())
    torch.manual_seed(3)
    editor.edit(model, requests)
    torch.manual_seed(3)
    assert seen == [int(torch.randint(2**62, ()))]


def test_every_batch_has_an_adapter_of_its_own(make_model, requests, tmp_path):
    model, editor = make_model("llama", torch.float32), lora(dropout=0.1)
    torch.manual_seed(2)
    outcome = run_batches(Setup(model, editor, SETTINGS, Checkpoints(tmp_path, 1, {})), requests, 2)
    assert editor.state_dict() == {}
    torch.manual_seed(2)
    apart = [lora(dropout=0.1).edit(model, batch) for batch in (requests[:2], requests[2:])]
    assert outcome.norms == [delta.norms() for delta in apart]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # W and its transpose
def test_a_resumed_run_equals_an_uninterrupted_one(family, make_model, requests, tmp_path):
    def make():
        return make_model(family, torch.float32), lora(dropout=0.1)

    killed_and_resumed(make, requests, tmp_path)


def test_a_bfloat16_model_has_a_float32_adapter(make_model, requests):
    model = make_model("llama", torch.bfloat16)
    editor = lora(dropout=0.1, steps=15, learning_rate=0.03)
    losses = []
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
        delta = editor.edit(model, requests[:1])
        assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
        assert all(f.dtype == torch.float32 for part in delta.values() for f in part.factors())
        losses.append(loss(model, requests[0]))
        model.apply(delta)
        losses.append(loss(model, requests[0]))
    assert losses[1] < 0.5 * losses[0]
    assert losses[3] < losses[2]


def loss(model, request):
    batch = model.collate(model.encode([(request.filled_prompt, request.target_new)]))
    return float(cross_entropy(model.answer_logits(batch), batch.labels))


def test_what_is_learnt_is_not_trained_on(make_model, requests):
    model, editor = make_model("llama", torch.float32), lora(tolerance=1e9)
    delta = editor.edit(model, requests)
    assert editor.steps == 0
    assert not any(part.norm() for part in delta.values())


def test_a_memory_of_edits_that_the_model_does_not_carry_is_refused(make_model, requests):
    model, editor = make_model("gptj", torch.float32), lora()
    model.apply(editor.edit(model, requests[:1]))
    model.revert()
    with pytest.raises(EditError, match=r"edits that the model does not carry.*load_state_dict"):
        editor.edit(model, requests[1:2])
    editor.load_state_dict({})
    editor.edit(model, requests[1:2])


@pytest.mark.parametrize("hparams", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_an_adapter_that_cannot_be_is_refused(hparams):
    with pytest.raises(
        ConfigError, match=r"^(rank|dropout) cannot be .* in the editor 'lora': Input should be"
    ):
        lora(**hparams)
