"""ROME, MEMIT and their family against literal dense computations, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.contexts import MEMIT_LENGTHS, ROME_LENGTHS, sample_contexts
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.post_norm import value_change
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.edits.weights import Dense
from kmebench.errors import ConfigError, EditError
from kmebench.models.encoding import SubjectText
from tests.conftest import FAMILIES, SOME_FAMILIES

LAYERS = (0, 1)
SHORT = {"steps": 3, "learning_rate": 0.2, "clamp_factor": 1.0}
NAMES = (
    *("rome", "r-rome", "memit", "memit-seq", "encore", "pmet", "emmet", "alphaedit"),
    *("betaedit", "prune", "rect"),
)


@pytest.fixture
def moments(tmp_path):
    """Second moments of both layers, [24, 24]; float32 as on disk."""
    torch.manual_seed(1)
    made = {layer: (x.T @ x / 60).float() for layer in LAYERS for x in [torch.randn(60, 24)]}
    write_covariance(tmp_path / "moments.safetensors", made, 60, {"source": "self"})
    return tmp_path / "moments.safetensors", {k: v.double() for k, v in made.items()}


def editor_of(name, moments, **hparams):
    return build_editor(name, SHORT | hparams, {"covariance": moments[0]})


def dense_w2(model, layer):
    """W2 as a [D, M] view of the live weight."""
    projection = model.ffn[layer].value
    return projection.weight.detach() if projection.axis == 1 else projection.weight.detach().T


def at_subject(model, request, module, before=""):
    """Input and output of a module at the subject's last token, one text, one full pass."""
    seen = []
    handle = module.register_forward_hook(
        lambda _m, args, kwargs, out: seen.append(
            (args[0] if args else kwargs["hidden_states"], out[0] if type(out) is tuple else out)
        ),
        with_kwargs=True,
    )
    text = SubjectText(before, request.prompt, request.subject, None)
    (item,) = model.encode_subjects([text])
    model.model(input_ids=torch.tensor([item.ids]))
    handle.remove()
    return tuple(states[0, item.subject_last] for states in seen[0])


def mean_at_subject(model, request, module, groups):
    """Mean inside each group of contexts, then over groups."""
    means = []
    for group in groups:
        pairs = [at_subject(model, request, module, t.removesuffix("{}")) for t in group]
        means.append([torch.stack(x).mean(0) for x in zip(*pairs, strict=True)])
    return tuple(torch.stack(x).mean(0) for x in zip(*means, strict=True))


def settings(name, layer, site):
    editor = build_editor(name, SHORT, {})
    h = editor.hparams
    return TargetSettings(
        layer, site, h.steps, h.learning_rate, h.kl_factor, h.weight_decay, h.clamp_factor
    )


@pytest.fixture(autouse=True)
def few_contexts(monkeypatch):
    """Half of the tokens and a third of the texts, for the editors and for what they are asked."""

    def few(model, lengths, seed):
        return sample_contexts(model, [(n // 2, texts // 3 + 1) for n, texts in lengths], seed)

    monkeypatch.setattr("kmebench.editors.contexts.sample_contexts", few)
    return few


#: Every family with both editors, and each of these with and without second moments.
ROMES = [
    (family, name, (number + (name == "rome")) % 2 == 0)
    for number, family in enumerate(FAMILIES)
    for name in ("rome", "r-rome")
]


@pytest.mark.parametrize(("family", "name", "second_moment"), ROMES)
def test_rome_maps_the_key_to_the_target(
    family, name, second_moment, make_model, requests, moments, few_contexts
):
    model, request = make_model(family), requests[1]
    groups = few_contexts(model, ROME_LENGTHS, seed=0)
    flat = (tuple(template for group in groups for template in group),)
    wanted = optimise_targets(model, [request], flat, settings(name, 1, "value"), name).values[0]
    editor = editor_of(name, moments, layer=1, second_moment=second_moment)
    delta = editor.edit(model, [request])
    module = model.ffn[1].value.module
    key = mean_at_subject(model, request, module, flat)[0]
    model.apply(delta)
    asked = (("{}",),) if name == "rome" else flat
    torch.testing.assert_close(
        mean_at_subject(model, request, module, asked)[1], wanted, rtol=1e-8, atol=1e-9
    )
    (part,) = delta.values()
    change = part.dense(model.ffn[1].value.weight.shape)
    change = change if model.ffn[1].value.axis == 1 else change.T  # [D, M]
    assert torch.linalg.matrix_rank(change) == 1
    direction = torch.linalg.solve(moments[1][1], key) if second_moment else key
    cosine = torch.nn.functional.cosine_similarity(change[0], direction, dim=0)
    assert math.isclose(abs(float(cosine)), 1.0, rel_tol=1e-9)


@pytest.mark.parametrize(("name", "module"), [("rome", "rome"), ("pmet", "memit")])
def test_every_value_of_the_loss_reaches_the_optimisation(
    name, module, make_model, requests, moments, monkeypatch
):
    loss = {
        "steps": 2,
        "learning_rate": 0.11,
        "kl_factor": 0.22,
        "weight_decay": 0.33,
        "clamp_factor": 0.44,
        "kl_position": "prompt_last",
    }
    used = []

    def spy(model, requests, contexts, settings, editor):
        used.append(settings)
        return optimise_targets(model, requests, contexts, settings, editor)

    monkeypatch.setattr(f"kmebench.editors.locate.{module}.optimise_targets", spy)
    where = {"layer": 1} if name == "rome" else {"layers": (0, 1)}
    editor_of(name, moments, **where, **loss).edit(make_model("llama"), requests[:1])
    assert {key: getattr(used[0], key) for key in loss} == loss


def literal(name, model, requests, moments, solve, groups):
    """The layers in turn on dense live weights; ``solve(layer, R, K, W)`` gives each change."""
    site = "attention-value" if name == "pmet" else "layer"
    targets = optimise_targets(model, requests, groups, settings(name, LAYERS[-1], site), name)
    last = LAYERS[-1]
    before = {layer: dense_w2(model, layer).clone() for layer in LAYERS}
    normed = "gemma" in model.model.config.model_type
    output = model.layers[last].post_feedforward_layernorm if normed else None
    where = (output or model.ffn[last].value.module) if name == "pmet" else model.layers[last]
    for done, layer in enumerate(LAYERS):
        module = model.ffn[layer].value.module
        keys = torch.stack([mean_at_subject(model, r, module, groups)[0] for r in requests], 1)
        current = torch.stack([at_subject(model, r, where)[1] for r in requests], 1)
        left = len(LAYERS) - done
        residual = (targets.values.T - current) / (math.sqrt(left) if name == "pmet" else left)
        if normed:  # what W2 has to say so that the norm behind it adds the residual
            said = torch.stack([at_subject(model, r, module)[1] for r in requests])
            norm = model.layers[layer].post_feedforward_layernorm
            residual = value_change(norm, said, residual.T).T
        weight = dense_w2(model, layer)
        weight += solve(layer, residual, keys, weight)
    edited = {layer: dense_w2(model, layer).clone() for layer in LAYERS}
    if name == "rect":  # once, when all layers are solved
        for layer, weight in before.items():
            delta = edited[layer] - weight
            relative = (delta / (weight + 1e-8)).abs()
            edited[layer] = weight + torch.where(relative >= relative.quantile(0.6), delta, 0.0)
    return edited


def solver(name, moments, earlier):
    """The definition of each update, by M x M solves."""

    def normal(penalty, keys, residual):
        return torch.linalg.solve(penalty + keys @ keys.T, keys @ residual.T).T

    def memit(layer, residual, keys, weight):
        return normal(20.0 * moments[1][layer], keys, residual)

    def emmet(layer, residual, keys, weight):
        inverse = torch.linalg.inv(20.0 * moments[1][layer])
        gram = keys.T @ inverse @ keys
        if keys.shape[1] > 1:
            gram += 0.05 * torch.eye(keys.shape[1], dtype=keys.dtype)
        return residual @ torch.linalg.inv(gram) @ keys.T @ inverse

    def alphaedit(layer, residual, keys, weight):
        values, vectors = torch.linalg.eigh(moments[1][layer])
        projector = vectors[:, values < 0.8] @ vectors[:, values < 0.8].T
        every = torch.cat([keys, *earlier.get(layer, [])], dim=1)
        held = every @ every.T + CHOICES[name].get("moment_weight", 0.0) * moments[1][layer]
        left = projector @ held + 0.5 * torch.eye(len(keys), dtype=keys.dtype)
        earlier.setdefault(layer, []).append(keys)
        return torch.linalg.solve(left, projector @ keys @ residual.T).T

    def sequential(layer, residual, keys, weight):
        """The released code of ENCORE: cov = λC + λ_n I + Σ K Kᵀ of earlier calls."""
        covariance = 20.0 * moments[1][layer]
        covariance = covariance + CHOICES[name].get("norm_weight", 0.0) * torch.eye(len(keys))
        for before in earlier.get(layer, []):
            covariance = covariance + before @ before.T
        earlier.setdefault(layer, []).append(keys)
        return residual @ torch.linalg.solve(covariance + keys @ keys.T, keys).T

    others = {"memit-seq": sequential, "encore": sequential, "emmet": emmet}
    others |= {"alphaedit": alphaedit, "betaedit": alphaedit}
    return others.get(name, memit)


CHOICES = {
    "memit": {"moment_weight": 20.0},
    "pmet": {"moment_weight": 20.0},
    "emmet": {"moment_weight": 20.0, "epsilon": 0.05},
    "rect": {"moment_weight": 20.0, "share": 0.4},
    "prune": {"moment_weight": 20.0},
    "memit-seq": {"moment_weight": 20.0},
    "encore": {"moment_weight": 20.0, "norm_weight": 3.0, "said_steps": None},
    "alphaedit": {"threshold": 0.8, "ridge": 0.5},
    "betaedit": {"threshold": 0.8, "ridge": 0.5, "moment_weight": 3.0},
}


#: What depends on the layout is in MEMIT and PMET; the others differ in what they solve.
SHARES = [
    *((family, name) for family in FAMILIES for name in ("memit", "pmet")),
    *((family, name) for family in ("gpt2", "gemma2") for name in CHOICES),
]


@pytest.mark.parametrize(("family", "name"), dict.fromkeys(SHARES))
def test_every_layer_learns_its_share_as_defined(
    family, name, make_model, requests, moments, few_contexts
):
    model, dense = make_model(family), make_model(family)
    groups = few_contexts(dense, MEMIT_LENGTHS, seed=0)
    expected = literal(name, dense, requests, moments, solver(name, moments, {}), groups)
    editor = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    delta = editor.edit(model, requests)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    model.apply(delta)
    for layer in LAYERS:
        torch.testing.assert_close(dense_w2(model, layer), expected[layer], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "name"),
    [*((f, "memit") for f in FAMILIES), ("gpt2", "alphaedit"), ("gemma2", "alphaedit")],
)
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_the_target_is_reached(name, layers, family, make_model, requests, moments, monkeypatch):
    """Almost nothing to preserve and no contexts: the edited model says z* where it stands.

    Behind a norm the last of several layers can only come close: what is left to it, when the lower
    ones have done their parts, is a little shorter than what the norm adds.
    """
    monkeypatch.setattr("kmebench.editors.contexts.sample_contexts", lambda *_, **__: (("{}",),))
    model, choices = make_model(family), {"layers": layers, "clamp_factor": 0.5}
    weights = {"memit": {"moment_weight": 1e-9}, "alphaedit": {"threshold": 99.0, "ridge": 1e-9}}
    wanted = optimise_targets(
        model,
        requests[:1],
        (("{}",),),
        replace(settings(name, layers[-1], "layer"), clamp_factor=0.5),
        name,
    ).values[0]
    before = at_subject(model, requests[0], model.layers[layers[-1]])[1]
    model.apply(editor_of(name, moments, **choices, **weights[name]).edit(model, requests[:1]))
    after = at_subject(model, requests[0], model.layers[layers[-1]])[1]
    miss = float((after - wanted).norm() / (wanted - before).norm())
    assert miss < (0.15 if "gemma" in family and len(layers) > 1 else 1e-6)


def test_emmets_epsilon_is_for_two_requests_or_more_unless_asked_for(
    make_model, requests, moments, few_contexts
):
    model, request, solve = make_model("llama"), requests[:1], solver("emmet", moments, {})
    contexts = few_contexts(model, MEMIT_LENGTHS, seed=0)
    wanted = literal("emmet", make_model("llama"), request, moments, solve, contexts)
    choices = {"layers": LAYERS} | CHOICES["emmet"]
    alone = editor_of("emmet", moments, **choices).edit(model, request)
    damped = editor_of("emmet", moments, epsilon_single=True, **choices).edit(model, request)
    first = model.ffn[LAYERS[0]].value.weight_name
    shape = model.ffn[LAYERS[0]].value.weight.shape
    # In the first layer the keys and residuals of both are the same: 1 / D against 1 / (D + ε).
    key = mean_at_subject(
        model,
        request[0],
        model.ffn[LAYERS[0]].value.module,
        contexts,
    )[0]
    d = key @ torch.linalg.solve(20.0 * moments[1][LAYERS[0]], key)
    torch.testing.assert_close(
        damped[first].dense(shape) * (d + 0.05) / d, alone[first].dense(shape)
    )
    model.apply(alone)
    for layer in LAYERS:
        torch.testing.assert_close(dense_w2(model, layer), wanted[layer], rtol=1e-8, atol=1e-9)


def test_emmet_names_the_two_requests_whose_keys_are_the_same(make_model, requests, moments):
    same = replace(requests[1], case_id="again", target_new="Rome")
    editor = editor_of("emmet", moments, layers=(1,), epsilon=0.0)
    with pytest.raises(
        EditError, match=r"^emmet: layer 1, requests 'b' and 'again': .*dependent.*set epsilon"
    ):
        editor.edit(make_model("llama"), [*requests, same])


@pytest.mark.parametrize("name", ["memit", "memit-seq", "encore", "alphaedit", "betaedit"])
def test_consecutive_edits_equal_the_literal_ones(
    name, make_model, requests, moments, few_contexts
):
    """But for MEMIT they protect the keys of earlier edits; a reset editor starts without any."""
    model, dense = make_model("llama"), make_model("llama")
    solve = solver(name, moments, {})
    contexts = few_contexts(dense, MEMIT_LENGTHS, seed=0)  # of the original model, once
    editor = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    for number, request in enumerate(requests[:2]):
        delta = editor.edit(model, [request])
        model.apply(delta)
        expected = literal(name, dense, [request], moments, solve, contexts)
        for layer in LAYERS:
            torch.testing.assert_close(
                dense_w2(model, layer), expected[layer], rtol=1e-7, atol=1e-8, msg=str(number)
            )
    model.revert()
    editor.load_state_dict({})
    fresh = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    for again, first in zip(
        editor.edit(model, requests[:1]).values(),
        fresh.edit(model, requests[:1]).values(),
        strict=True,
    ):
        assert torch.equal(again.u, first.u)
        assert torch.equal(again.v, first.v)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_prune_restrains_the_sum_of_all_edits_at_the_end(family, make_model, requests, moments):
    """Edits are MEMIT's; then singular values of each total above W0's largest shrink."""
    model, dense = make_model(family), make_model(family)
    choices = {"layers": LAYERS, "clamp_factor": 9.0, "learning_rate": 5.0, "moment_weight": 0.1}
    editor = editor_of("prune", moments, base=3.0, **choices)
    plain = editor_of("memit", moments, **choices)
    for request in requests:
        model.apply(editor.edit(model, [request]))
        dense.apply(plain.edit(dense, [request]))
    last = editor.final_edit(model)
    model.apply(last)
    edited = {layer: dense_w2(dense, layer).clone() for layer in LAYERS}
    dense.revert()
    n_above = 0
    for layer in LAYERS:
        original = dense_w2(dense, layer)
        left, sigma, right = torch.linalg.svd(edited[layer] - original, full_matrices=False)
        largest = torch.linalg.svdvals(original)[0]
        n_above += int((sigma > largest).sum())
        shrunk = (sigma / largest).log() / math.log(3.0) + largest
        sigma = torch.where(sigma > largest, shrunk, sigma)
        torch.testing.assert_close(
            dense_w2(model, layer), original + left @ sigma.diag() @ right, rtol=1e-8, atol=1e-9
        )
    assert n_above or "gemma" in family  # a norm behind W2 keeps what is asked of it small


def test_prune_has_nothing_to_restrain_where_no_edit_could_be_made(make_model, moments):
    assert not editor_of("prune", moments, layers=LAYERS).final_edit(make_model("llama"))


@pytest.mark.parametrize("name", ["memit-seq", "encore", "alphaedit", "betaedit"])
def test_the_memory_of_keys_survives_a_round_trip(name, make_model, requests, moments):
    model = make_model("gptj")
    editor = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    model.apply(editor.edit(model, requests[:1]))
    resumed = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    resumed.load_state_dict({k: v.clone() for k, v in editor.state_dict().items()})
    forgetful = editor_of(name, moments, layers=LAYERS, **CHOICES[name])
    ours, theirs, others = (
        [part.dense(torch.Size((16, 24))) for part in e.edit(model, requests[1:2]).values()]
        for e in (editor, resumed, forgetful)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_models_get_float32_changes(name, make_model, requests, moments):
    model = make_model("llama", torch.bfloat16)
    choices = {"layer": 1} if "rome" in name else {"layers": LAYERS} | CHOICES[name]
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    delta = editor_of(name, moments, **choices).edit(model, requests[:2])
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    for part in delta.values():
        values = part.values if isinstance(part, Dense) else part.u
        assert values.dtype == torch.float32
    assert delta.is_finite()


@pytest.mark.parametrize("name", NAMES)
def test_layers_the_model_has_not_are_refused(name, make_model, requests, moments):
    layers = {"layer": 7} if "rome" in name else {"layers": (1, 7)}
    with pytest.raises(ConfigError, match=rf"{name}: layers \[.*7\].*0 to 2"):
        editor_of(name, moments, **layers).edit(make_model("llama"), requests[:1])


def test_a_singular_moment_names_editor_layer_and_request(make_model, requests, tmp_path):
    write_covariance(tmp_path / "m", {1: torch.zeros(24, 24)}, 60, {"source": "self"})
    editor = build_editor("memit", SHORT | {"layers": (1,)}, {"covariance": tmp_path / "m"})
    with pytest.raises(EditError, match=r"memit: layer 1, request 'a' to 'c': .*singular"):
        editor.edit(make_model("llama"), requests)


def test_alphaedit_without_a_null_space_says_so(make_model, requests, moments):
    editor = editor_of("alphaedit", moments, layers=LAYERS, threshold=1e-9)
    with pytest.raises(EditError, match=r"alphaedit: layer 0.*: none of .* raise threshold"):
        editor.edit(make_model("llama"), requests)
