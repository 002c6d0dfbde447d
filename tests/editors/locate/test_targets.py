"""Targets: the shared replay against plain full forward passes, one request at a time."""

from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.locate.target_rows import TargetRows
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.errors import EditError
from kmebench.models.encoding import SubjectText, encode_subjects
from tests.conftest import FAMILIES, SOME_FAMILIES, in_turn, without_word

CONTEXTS = (("{}",), ("The Seine. {}", "I {} {. {}"), ("Paris stands in Mount Fuji. {}",))
SITES = ("layer", "value", "attention-value")
PAIRS = in_turn(SITES)
SOME_PAIRS = [(family, site) for family, site in PAIRS if family in SOME_FAMILIES]
SETTINGS = TargetSettings(
    layer=1,
    site="layer",
    steps=8,
    learning_rate=0.3,
    kl_factor=0.5,
    weight_decay=0.2,
    clamp_factor=2.0,
    micro_batch=2,
)


def modules_of(model, settings):
    """Where the deltas are added, and where the first of them puts the target."""
    layer, normed = model.layers[settings.layer], "gemma" in model.model.config.model_type
    value, attention = model.ffn[settings.layer].value.module, model.attention[settings.layer]
    added = layer.post_feedforward_layernorm if normed else value
    return {
        "layer": ([value if normed else layer], layer),
        "value": ([value], value),
        "attention-value": ([value, attention], added),
    }[settings.site]


def standing(model, item, module, change):
    """What a module says at the subject once the change is added, perhaps to itself."""
    seen = []

    def see(_m, _i, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0, item.subject_last])

    moved, delta = change
    with moved.register_forward_hook(adding(item, delta)), module.register_forward_hook(see):
        model.model(torch.tensor([item.ids]))
    return seen[0]


def adding(item, delta):
    """A hook that adds delta at the subject."""

    def add(_m, _i, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, item.subject_last] += delta
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return add


def forward(model, item, changes):
    """Logits [T, V] of one whole text, and what the modules said at its subject.

    ``changes`` pairs modules with what is added at the subject, if anything.
    """
    seen = {}

    def hook(module, delta):
        def see(_m, _i, output):
            states = output[0] if isinstance(output, tuple) else output
            seen[module] = states[0, item.subject_last].detach().clone()
            return None if delta is None else adding(item, delta)(_m, _i, output)

        return module.register_forward_hook(see)

    with ExitStack() as stack:
        for module, delta in changes:
            stack.callback(hook(module, delta).remove)
        return model.model(torch.tensor([item.ids])).logits[0], seen


class Plain(NamedTuple):
    values: torch.Tensor
    start: torch.Tensor
    losses: list[float]  # of each pass
    steps: int  # updates
    clamped: bool  # the ball was touched
    shares: list[float]  # PMET's of the target loss, of each pass


def plain_targets(model, request, settings, contexts=CONTEXTS) -> Plain:
    prompts = encode_subjects(
        model.tokenizer,
        [
            SubjectText(c[:-2], request.prompt, request.subject, request.target_new)
            for group in contexts
            for c in group
        ],
    )
    kl_prompt = encode_subjects(
        model.tokenizer, [SubjectText("", "{} is a", request.subject, None)]
    )[0]
    modules, place = modules_of(model, settings)
    _, seen = forward(model, prompts[0], [(m, None) for m in modules])
    start = [seen[m] for m in modules]
    column = kl_prompt.subject_last if settings.kl_position == "subject_last" else -1
    log_p0 = forward(model, kl_prompt, [])[0][column].log_softmax(dim=-1)
    deltas = [torch.zeros_like(h, requires_grad=True) for h in start]
    adam = torch.optim.Adam(deltas, lr=settings.learning_rate)
    losses, steps, clamped, share, shares = [], 0, False, 1.0, []
    for step in range(settings.steps):
        changes = list(zip(modules, deltas, strict=True))
        nll, said = 0, True
        for item in prompts:
            logits = forward(model, item, changes)[0]
            answers = logits[len(item.ids) - item.n_target - 1 : -1]
            nll = nll + cross_entropy(answers, torch.tensor(item.target_ids)) / len(prompts)
            said &= answers.argmax(dim=-1).tolist() == list(item.target_ids)
        log_p = forward(model, kl_prompt, changes)[0][column].log_softmax(dim=-1)
        kl = (log_p.exp() * (log_p - log_p0)).sum()  # KL(edited ‖ original): Meng et al., eq. 4b
        loss = share * nll + settings.kl_factor * kl
        for delta, h in zip(deltas, start, strict=True):
            loss = loss + settings.weight_decay * delta.norm() / h.norm() ** 2
        losses.append(loss.item())
        shares.append(share)
        if loss < settings.stop_loss:
            break
        if settings.site == "attention-value":
            share = 0.1 if said else 1.0
            if said and settings.kl_factor * kl <= 0.01:
                break
        if step == settings.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        steps += 1
        with torch.no_grad():
            for delta, h in zip(deltas, start, strict=True):
                if delta.norm() > settings.clamp_factor * h.norm():
                    delta *= settings.clamp_factor * h.norm() / delta.norm()
                    clamped = True
    values = standing(model, prompts[0], place, (modules[0], deltas[0])).detach()
    return Plain(values, start[0], losses, steps, clamped, shares)


def between(losses):
    """A threshold that half of the losses are under and none is near."""
    ranked = losses.sort().values
    return float(ranked[len(ranked) // 2 - 1 : len(ranked) // 2 + 1].mean())


def compare(model, requests, settings, contexts=CONTEXTS):
    """Check all requests together against each by itself; return the plain results."""
    got = optimise_targets(model, requests, contexts, settings, "memit")
    everything = []
    for i, request in enumerate(requests):
        plain = plain_targets(model, request, settings, contexts)
        mine = got.losses[:, i][got.losses[:, i].isfinite()]
        losses = torch.tensor(plain.losses, dtype=mine.dtype)
        # Adam makes the rounding of gradients near zero larger.
        torch.testing.assert_close(mine, losses, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(got.start[i], plain.start, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.values[i], plain.values, rtol=1e-7, atol=1e-7)
        assert int(got.steps[i]) == plain.steps
        everything.append(plain)
    return got, everything


@pytest.fixture
def varied(requests):
    """Prompts of many lengths; a subject that begins the text and one that ends the prompt."""
    return [
        *requests,
        EditRequest("d", "Japan", "{}, and in Japan the Seine flows to", "Mount Fuji"),
        EditRequest("e", "Mount Fuji", "The language of Paris is spoken in {}", "Italy"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_targets_equal_plain_optimisation_of_each_request(family, site, make_model, varied):
    model = make_model(family)
    clamp_factor = 0.4 if site == "layer" else 2.0
    settings = replace(SETTINGS, site=site, steps=4, clamp_factor=clamp_factor)
    got, _ = compare(model, varied[2:], settings)
    assert got.losses[-1].mean() < got.losses[0].mean()


@pytest.mark.parametrize(("family", "site"), SOME_PAIRS)
def test_requests_stop_by_themselves(family, site, make_model, varied):
    """One stops before any step, others at different steps, and some never."""
    model = make_model(family)
    settings = replace(SETTINGS, site=site, steps=12, micro_batch=50, kl_factor=1e-3)
    first = optimise_targets(model, varied, CONTEXTS, settings, "memit").losses
    settings = replace(settings, stop_loss=between(first[5]))
    got, _ = compare(model, varied, settings)
    assert len(got.steps.unique()) > 1
    if family in ("gptj", "llama", "gpt2"):
        assert len(got.steps.unique()) > 2


@pytest.mark.parametrize("site", SITES)
def test_what_is_learnt_from_the_start_is_left_alone(site, make_model, requests):
    model = make_model("llama")
    got, _ = compare(model, requests, replace(SETTINGS, site=site, stop_loss=1e9))
    assert got.steps.tolist() == [0, 0, 0]
    assert torch.equal(got.values, got.start)


@pytest.mark.parametrize(("family", "site"), SOME_PAIRS)
def test_deltas_stay_in_their_balls(family, site, make_model, requests):
    model = make_model(family)
    settings = replace(SETTINGS, site=site, steps=4, clamp_factor=0.1)
    got, plain = compare(model, requests, settings)
    assert all(p.clamped for p in plain)
    (moved, *_), place = modules_of(model, settings)
    if moved is place:  # no norm is between the delta and the target
        ratio = (got.values - got.start).norm(dim=1) / got.start.norm(dim=1)
        assert float(ratio.max()) <= 0.1 + 1e-12


@pytest.mark.parametrize("kl_factor", [0.0, 5.0])
def test_kl_holds_what_is_said_after_the_subject(kl_factor, make_model, requests):
    model = make_model("gpt2")
    compare(model, requests, replace(SETTINGS, kl_factor=kl_factor, weight_decay=0.0))


#: Where the subject ends the prompt a random model can be brought to say anything.
PMET = replace(
    SETTINGS,
    site="attention-value",
    steps=25,
    learning_rate=1.0,
    weight_decay=1e-3,
    clamp_factor=1e4,
    stop_loss=0.0,
)
REACHABLE = [EditRequest("e", "Japan", "The capital of {}", "Paris")]


@pytest.mark.parametrize(("family", "kl_factor"), [("gptj", 0.3), ("llama", 3.0), ("gpt2", 3.0)])
def test_pmet_cuts_the_target_loss_after_every_context_has_said_the_target(
    family, kl_factor, make_model
):
    """With a large κ the KL stays above its bound; the share goes down, and up again."""
    settings = replace(PMET, kl_factor=kl_factor)
    _, (plain,) = compare(make_model(family), REACHABLE, settings, CONTEXTS[:2])
    assert set(plain.shares) == {0.1, 1.0}
    assert 1.0 in plain.shares[plain.shares.index(0.1) :]


@pytest.mark.parametrize("family", ["gptj", "llama", "gpt2", "phi3", "qwen3", "opt"])
def test_pmet_ends_once_the_target_is_said_and_kl_is_small(family, make_model):
    settings = replace(PMET, kl_factor=1e-4)
    got, (plain,) = compare(make_model(family), REACHABLE, settings, CONTEXTS[:2])
    assert len(plain.losses) < 10
    assert got.losses[len(plain.losses) - 1] > 0.05  # far from learnt by the loss


@pytest.mark.parametrize("kl_factor", [0.6, 5.0])
def test_pmet_ends_below_the_loss_whatever_kl_is(kl_factor, make_model):
    model, settings = make_model("llama"), replace(PMET, kl_factor=kl_factor)
    losses = optimise_targets(model, REACHABLE, CONTEXTS[:2], settings, "pmet").losses[:, 0]
    settings = replace(settings, stop_loss=float(losses[5]) + 1e-6)
    compare(model, REACHABLE, settings, CONTEXTS[:2])


@pytest.mark.parametrize("site", SITES)
def test_the_first_gradient_of_kl_is_that_of_the_edited_distribution_first(
    site, make_model, requests
):
    """KL alone, from a δ of the first step on: Σ p_δ (log p_δ − log p0), not the reverse."""
    settings = replace(SETTINGS, site=site, kl_factor=1e4, steps=3, weight_decay=0.0)
    model = make_model("llama")
    for position in ("subject_last", "prompt_last"):
        compare(model, requests, replace(settings, kl_position=position))


def test_the_kl_of_a_distribution_made_by_hand(make_model, requests):
    """log p0 is put in by hand, so value and gradient are known in closed form."""
    model, request = make_model("llama"), requests[0]
    texts = [
        SubjectText("", request.prompt, request.subject, request.target_new),
        SubjectText("", "{} is a", request.subject, None),
    ]
    encoded = model.encode_subjects(texts)
    rows = TargetRows.of(model, [encoded], 1, "layer")
    size = model.model.config.vocab_size
    p0 = torch.arange(1, size + 1, dtype=torch.float64)
    p0 /= p0.sum()
    rows.log_p0 = p0.log()[None]
    delta = torch.full((1, 1, 16), 0.1, dtype=torch.float64, requires_grad=True)
    kl = rows.losses(delta).kl
    (gradient,) = torch.autograd.grad(kl, delta)

    again = delta.detach().clone().requires_grad_()
    logits = forward(model, encoded[1], [(model.layers[1], again[0, 0])])[0][-1]
    p = logits.softmax(dim=-1)
    torch.testing.assert_close(kl[0], (p * (p / p0).log()).sum())
    # d KL / d logit_i = p_i (log(p_i / p0_i) − KL)
    slope = p * ((p / p0).log() - (p * (p / p0).log()).sum())
    (expected,) = torch.autograd.grad(logits, again, slope.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("site", SITES)
def test_steps_are_forward_passes_and_one_pass_changes_nothing(site, make_model, requests):
    model = make_model("gptj")
    once = optimise_targets(model, requests, CONTEXTS, replace(SETTINGS, site=site, steps=1), "m")
    assert torch.equal(once.values, once.start)
    assert once.losses.isfinite().all()
    thrice = optimise_targets(model, requests, CONTEXTS, replace(SETTINGS, site=site, steps=3), "m")
    assert thrice.steps.tolist() == [2, 2, 2]
    assert thrice.losses.isfinite().all()


@pytest.mark.parametrize(("family", "site"), PAIRS)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_lowest_and_the_highest_layer_can_be_edited(family, layer, site, make_model, requests):
    # In the highest layer no δ reaches what is said after the subject, and KL there has no slope
    # at first: Adam would make steps of the rounding of zero.
    above = {"site": site, "steps": 3, "kl_position": "prompt_last"}
    compare(make_model(family), requests[:2], replace(SETTINGS, **above, layer=layer))


def test_the_batch_does_not_matter(make_model, varied):
    model = make_model("gptj")
    every = [
        optimise_targets(model, varied, CONTEXTS, replace(SETTINGS, micro_batch=n), "memit").values
        for n in (1, 3, 50)
    ]
    for values in every[1:]:
        torch.testing.assert_close(values, every[0], rtol=1e-9, atol=1e-9)


def test_the_bare_prompt_alone_and_a_subject_of_one_first_token(make_model):
    """No position stands before any subject: there is nothing to keep."""
    request = EditRequest("r", "P", "{} is the capital of", "Italy")
    compare(make_model("llama"), [request], SETTINGS, contexts=(("{}",),))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_live_weights_are_used_and_nothing_is_left_behind(family, make_model, requests):
    model = make_model(family)
    with torch.no_grad():
        model.ffn[2].value.weight.mul_(1.5)
        model.ffn[0].key.weight.mul_(0.5)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    settings = replace(SETTINGS, steps=3)
    with torch.no_grad():
        compare_under_no_grad = optimise_targets(model, requests, CONTEXTS, settings, "memit")
    got, _ = compare(model, requests, settings)
    assert torch.equal(compare_under_no_grad.values, got.values)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize("site", SITES)
def test_the_same_bytes_twice(site, make_model, requests):
    model = make_model("llama", torch.float32)
    settings = replace(SETTINGS, site=site)
    one, two = (optimise_targets(model, requests, CONTEXTS, settings, "memit") for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.losses, two.losses)


@pytest.mark.parametrize(("family", "site"), SOME_PAIRS)
def test_bfloat16_models_have_float32_targets(family, site, make_model, requests):
    model = make_model(family, torch.bfloat16)
    settings = replace(SETTINGS, site=site, learning_rate=0.1)
    got = optimise_targets(model, requests, CONTEXTS, settings, "memit")
    assert got.values.dtype == got.losses.dtype == torch.float32
    first = [plain_targets(model, r, replace(settings, steps=1)).losses[0] for r in requests]
    torch.testing.assert_close(got.losses[0], torch.tensor(first), rtol=0.05, atol=0.05)
    assert got.losses[-1].mean() < got.losses[0].mean()


def test_a_loss_that_is_no_number_names_editor_request_and_layer(make_model, requests):
    model = make_model("llama")
    with torch.no_grad():
        row = model.tokenizer("Japan")["input_ids"][-1]
        model.model.get_input_embeddings().weight[row] = torch.nan
    with pytest.raises(
        EditError, match=r"^memit: the target of request 'b' at layer 1 became NaN or infinite at "
    ):
        optimise_targets(model, requests[1:2], CONTEXTS, SETTINGS, "memit")


def test_a_delta_that_is_no_number_is_refused(make_model, requests):
    model, settings = make_model("gptj"), replace(SETTINGS, learning_rate=float("inf"), steps=2)
    with pytest.raises(EditError, match=r"rome: .* 'a' at layer 1 .* \(now inf\)"):
        optimise_targets(model, requests[:1], CONTEXTS, settings, "rome")


@pytest.mark.parametrize("site", SITES)
def test_a_request_that_fails_leaves_the_others_what_they_are(site, make_model, requests):
    model = without_word(make_model("gptj"), " Japan")
    settings = replace(SETTINGS, site=site, keep_failed=True)
    expected = optimise_targets(model, [requests[0], requests[2]], CONTEXTS, settings, "memit")
    for micro_batch in (1, 2, 3):
        asked = replace(settings, micro_batch=micro_batch)
        found = optimise_targets(model, requests, CONTEXTS, asked, "memit")
        assert found.failed.keys() == {"b"}
        assert found.values[1].isnan().all()
        kept = found.values[[0, 2]]
        torch.testing.assert_close(kept, expected.values, rtol=1e-9, atol=1e-12)
        assert found.steps.tolist() == [expected.steps[0], 0, expected.steps[1]]


def test_deltas_that_are_no_numbers_are_kept_as_failed(make_model, requests):
    model = make_model("gptj")
    settings = replace(SETTINGS, learning_rate=float("inf"), keep_failed=True)
    found = optimise_targets(model, requests, CONTEXTS, settings, "rome")
    assert found.values.isnan().all()
    assert "rome: the target of request 'c' at layer 1" in found.failed["c"]


def test_one_large_batch_shows_its_passes_and_one_request_does_not(make_model, requests, caplog):
    model = make_model("llama")
    caplog.set_level("INFO", "kmebench")
    optimise_targets(model, requests[:1], CONTEXTS, SETTINGS, "memit")
    assert not caplog.messages
    optimise_targets(model, requests[:2], CONTEXTS, SETTINGS, "memit")
    assert "passes of the targets: 4 of 8" in caplog.messages
