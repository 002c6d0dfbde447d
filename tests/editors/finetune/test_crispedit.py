"""CrispEdit against the dense K-FAC matrix, autograd through rotated weights, and plain Adam."""

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.finetune.crispedit import Subspace, low_curvature
from kmebench.editors.locate.covariance.factors import cache_factor, spectrum_of
from kmebench.editors.locate.covariance.store import Covariances, write_covariance
from kmebench.editors.needs import Covariance, NeutralMetric, Spectrum
from kmebench.editors.pac.neutral import Moments, read_metric, save_metric
from kmebench.errors import ConfigError, EditError
from tests.conftest import in_turn
from tests.editors.finetune.literal import on_the_target

LAYERS = (0, 1)
HPARAMS = {"layers": LAYERS, "gamma": 0.8, "learning_rate": 0.01, "steps": 3, "tolerance": 0.0}
HPARAMS |= {"mini_batch": 2, "neutral_tokens": 300}


def random_factor(size, seed):
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


@pytest.fixture
def assets(tmp_path):
    """The files of both factors of every layer, made up, with D = 16 and M = 24."""
    files = {kind: tmp_path / kind for kind in (NeutralMetric.asset, Covariance.asset)}
    moments, covariances = {}, {}
    for layer in LAYERS:
        outputs = random_factor(16, layer).float()
        moments[layer] = Moments(torch.eye(16), torch.ones(24), outputs)
        covariances[layer] = random_factor(24, 10 + layer).float()
    save_metric(files[NeutralMetric.asset], moments, 1)
    write_covariance(files[Covariance.asset], covariances, 1, {"source": "made up"})
    return files


def crispedit(assets, **hparams):
    return build_editor("crispedit", HPARAMS | hparams, assets)


def factors(files, layer):
    """F [D, D] and A [M, M] as they were measured."""
    outputs = read_metric(files[NeutralMetric.asset], layer).outputs
    return outputs.double(), Covariances.open(files[Covariance.asset]).of(layer).double()


def rotations(files, layer, share):
    """Eigenvectors of F and A in columns, and which coordinates [D, M] are kept, one by one."""
    (f, left), (a, right) = (torch.linalg.eigh(factor) for factor in factors(files, layer))
    curvature = f.clamp(min=0)[:, None] * a.clamp(min=0)
    total, left_out = 0.0, set()
    for place in curvature.flatten().argsort(descending=True).tolist():
        if total >= share * float(curvature.sum()):
            break
        total += float(curvature.flatten()[place])
        left_out.add(place)
    kept = [place not in left_out for place in range(curvature.numel())]
    return left, right, torch.tensor(kept).view(curvature.shape)


def w2_changes(model, delta):
    """ΔW2 [D, M] of every layer, however it is stored."""
    found = {}
    for layer in LAYERS:
        value = model.ffn[layer].value
        change = delta[value.weight_name].dense(value.weight.shape)
        found[layer] = change if value.axis == 1 else change.T
    return found


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_the_projection_is_that_of_the_dense_kronecker_product(share):
    f, a = random_factor(4, 0), random_factor(6, 1)
    left, right = spectrum_of(f), spectrum_of(a)
    kept = low_curvature(left.values, right.values, share)
    space = Subspace(left.vectors, right.vectors, kept)
    values, vectors = torch.linalg.eigh(torch.kron(f, a))  # of rows one after another
    ranked, n = values.flip(0), 0
    while ranked[:n].sum() < share * values.sum():
        n += 1
    low = vectors[:, : len(values) - n]
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    projected = space.weights(space.coordinates(gradient))
    expected = (low @ low.T @ gradient.flatten()).view(4, 6)
    torch.testing.assert_close(projected, expected, rtol=1e-10, atol=1e-12)
    again = space.weights(space.coordinates(projected))
    torch.testing.assert_close(again, projected, rtol=1e-12, atol=1e-14)


def test_the_largest_curvatures_that_hold_the_share_are_left_out():
    left, right = torch.tensor([1.0, 4.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    # Curvatures 0.5, 1, 2 and 2, 4, 8, in all 17.5: 8 and 4 are 68.6%, with both 2 91.4%.
    low = [[True, True, True], [True, False, False]]
    assert low_curvature(left, right, 0.68).tolist() == low
    low = [[True, True, False], [False, False, False]]
    assert low_curvature(left, right, 0.7).tolist() == low  # of equals none is kept
    assert low_curvature(left, right, 0.9).tolist() == low
    assert not low_curvature(left, right, 1.0).any()
    unused = torch.tensor([-1e-18, 0.0, 2.0]).double()  # a direction that no text uses
    assert low_curvature(left, unused, 1.0).tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_updates_never_leave_the_directions_and_projected_gradients_do(
    family, make_model, requests, assets
):
    model = make_model(family)
    outside = {}
    for project in ("update", "gradient"):
        torch.manual_seed(1)
        editor = crispedit(assets, project=project)
        changes = w2_changes(model, editor(model, requests).edit.weights)
        parts = []
        for layer, change in changes.items():
            left, right, kept = rotations(assets, layer, 0.8)
            assert 0 < int(kept.sum()) < kept.numel()
            part = left.T @ change @ right
            assert part[kept].abs().max() > 1e-3
            parts.append(float(part[~kept].abs().max()))
        outside[project] = max(parts)
    assert outside["update"] < 1e-12
    assert outside["gradient"] > 1e-4  # Adam's division by element


def written_out(model, files, requests, project):
    """ΔW2 by torch's Adam: on W2 with gradients cut by hand, or by autograd on coordinates."""
    texts = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    values = {layer: model.ffn[layer].value for layer in LAYERS}
    turned = {n: rotations(files, n, 0.8) for n in LAYERS}
    free = {n: torch.zeros(kept.shape).double() for n, (*_, kept) in turned.items()}
    adam = torch.optim.Adam([x.requires_grad_() for x in free.values()], lr=0.01)

    def change(n):
        left, right, kept = turned[n]
        return left @ (free[n] * kept) @ right.T if project == "update" else free[n]

    def weight(n):
        added = change(n)
        return values[n].weight.detach() + (added if values[n].axis == 1 else added.T)

    torch.manual_seed(1)
    for _ in range(HPARAMS["steps"]):
        for group in torch.randperm(len(requests)).split(2):
            adam.zero_grad()
            weights = {v.weight_name: weight(n) for n, v in values.items()}
            loss = 0.0
            for e in (texts[i] for i in group):
                ids = {"input_ids": torch.tensor([e.ids])}
                out = torch.func.functional_call(model.model, weights, kwargs=ids)
                loss = loss + on_the_target(out.logits[0], e.target_ids) / len(group)
            loss.backward()
            if project == "gradient":
                for n, (left, right, kept) in turned.items():
                    cut = (left.T @ free[n].grad @ right) * kept
                    free[n].grad = left @ cut @ right.T
            adam.step()
    return {n: change(n).detach() for n in LAYERS}


@pytest.mark.parametrize(("family", "project"), in_turn(["gradient", "update"])[2:])
def test_crispedit_equals_adam_written_out(project, family, make_model, requests, assets):
    model = make_model(family)
    with torch.enable_grad():
        expected = written_out(model, assets, requests, project)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    torch.manual_seed(1)
    editor = crispedit(assets, project=project)
    found = w2_changes(model, editor(model, requests).edit.weights)
    assert editor.steps == 2 * HPARAMS["steps"]
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("project", ["gradient", "update"])
def test_without_gamma_it_is_locft_bf_without_an_end_of_text(project, make_model, requests):
    changes = []
    shared = {name: HPARAMS[name] for name in ("learning_rate", "steps", "mini_batch", "tolerance")}
    for editor in (
        crispedit({}, layers=[1], gamma=0, project=project),
        build_editor("locft-bf", {"layer": 1, "append_eos": False, **shared}, {}),
    ):
        model = make_model("llama", torch.float32)
        torch.manual_seed(1)
        ((name, part),) = editor(model, requests).edit.weights.items()
        changes.append((name, part.values))
    assert changes[0][0] == changes[1][0]
    assert torch.equal(changes[0][1], changes[1][1])


def test_the_cached_spectrum_of_the_covariance_is_what_is_computed_of_it(
    make_model, requests, assets, tmp_path
):
    model = make_model("llama")
    torch.manual_seed(1)
    computed = w2_changes(model, crispedit(assets)(model, requests).edit.weights)
    cached = {NeutralMetric.asset: assets[NeutralMetric.asset]}
    for layer in LAYERS:
        key = Spectrum(layer).key
        cached[key] = tmp_path / key
        cache_factor(cached[key], assets[Covariance.asset], Spectrum.asset, layer)
    torch.manual_seed(1)
    found = w2_changes(model, crispedit(cached)(model, requests).edit.weights)
    assert all(torch.equal(found[layer], computed[layer]) for layer in LAYERS)


@pytest.mark.parametrize("project", ["gradient", "update"])
def test_it_goes_on_after_a_pass_with_the_same_bits(project, make_model, requests, assets):
    model = make_model("gpt2", torch.float32)
    states = []
    torch.manual_seed(1)
    editor = crispedit(assets, project=project)

    def save(_):
        state = {k: t.clone() for k, t in editor.state_dict().items()}
        states.append((state, torch.get_rng_state()))

    straight = w2_changes(model, editor(model, requests, after_epoch=save).edit.weights)
    state, generator = states[0]
    resumed = crispedit(assets, project=project)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    found = w2_changes(model, resumed.edit(model, requests))
    assert len(states) == HPARAMS["steps"]
    assert resumed.steps == editor.steps
    assert all(torch.equal(found[layer], straight[layer]) for layer in LAYERS)


def test_what_cannot_be_edited_is_a_sentence(make_model, requests, assets):
    model = make_model("llama")
    with pytest.raises(EditError, match=r"crispedit: in layer 0 no direction .* lower gamma \(now"):
        crispedit(assets, gamma=1.0)(model, requests)
    with pytest.raises(ConfigError, match=r"crispedit: layers \[7\] are not all among"):
        crispedit(assets, layers=[7])(model, requests)
    with pytest.raises(ConfigError, match=r"gamma cannot be 1\.5"):
        crispedit(assets, gamma=1.5)
