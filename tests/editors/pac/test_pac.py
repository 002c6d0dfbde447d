"""PAC against a literal dense implementation of its loss and updates."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.editors.needs import Paths
from kmebench.editors.pac import pac
from kmebench.editors.pac.cache import GradientCache, cache_gradients, select_groups, write_paths
from kmebench.editors.pac.impact import trace
from kmebench.editors.pac.paths import select_paths
from kmebench.errors import ConfigError, EditError
from kmebench.io.parts import Parts
from tests.conftest import FAMILIES, SOME_FAMILIES

HPARAMS = {"paths": 3, "negatives": 2, "learning_rate": 0.01, "tolerance": 0.0, "steps": 5}


def literal_pac(model, requests, hparams, n_layers):
    """Dense weights, full gradients, masks, two Adams: the equations with nothing shared.

    Returns the final dense weights by name, and who was stepped on at every step.
    """
    routes = []
    for request in requests:
        impact = trace(model, [request])
        paths = select_paths(impact.l2, hparams["paths"], hparams["negatives"])
        routes.append((paths.positive[0], paths.negative[0], impact.answers[0]))
    parameters = dict(model.model.named_parameters())
    places = {}
    for layer, ffn in enumerate(model.ffn):
        for matrix, projection in enumerate((ffn.key, ffn.value)):
            offset = projection.offset
            places[projection.weight_name] = (layer, matrix, projection.axis, offset)
            if matrix == 0 and projection.bias_name:
                places[projection.bias_name] = (layer, matrix, 0, offset)
    changes = {which: {n: torch.zeros_like(parameters[n]) for n in places} for which in (0, 1)}
    adams = {
        which: torch.optim.Adam(changes[which].values(), lr=hparams["learning_rate"])
        for which in (0, 1)
    }
    start = {n: parameters[n].clone() for n in places}
    stepped, asked = [], set(range(len(requests)))
    while len(stepped) < hparams["steps"]:
        for which in (0, 1):
            for name in places:
                changes[which][name].grad = torch.zeros_like(start[name])
        learning = set()
        for number in sorted(asked):
            (item,) = model.encode([(requests[number].filled_prompt, requests[number].target_new)])
            route = routes[number]
            for which, (labels, weight) in enumerate(
                ((item.target_ids, 1.0), (route[2], hparams.get("lambda", 0.1)))
            ):
                leaves = {
                    n: (start[n] + changes[0][n] + changes[1][n]).requires_grad_() for n in places
                }
                logits = torch.func.functional_call(
                    model.model, leaves, kwargs={"input_ids": torch.tensor([item.ids])}
                ).logits[0, -item.n_target - 1 : -1]
                loss = weight * cross_entropy(logits, torch.tensor(labels))
                if which == 0 and loss < hparams["tolerance"]:
                    break  # learnt
                learning.add(number)
                gradients = torch.autograd.grad(loss / len(requests), list(leaves.values()))
                for (name, (layer, matrix, axis, offset)), gradient in zip(
                    places.items(), gradients, strict=True
                ):
                    mask = torch.zeros_like(gradient)
                    for each in routes:
                        mask.movedim(axis, 0)[offset + each[which][layer, matrix]] = 1
                    changes[which][name].grad += gradient * mask
        if not learning and len(asked) == len(requests):
            break
        if learning:
            stepped.append(learning)
            for adam in adams.values():
                adam.step()
        again = not learning or len(stepped) % 5 == 0
        asked = set(range(len(requests))) if again else learning
    return {n: start[n] + changes[0][n] + changes[1][n] for n in places}, stepped


#: Both losses in one pass and in two on every family; the rest does not depend on the layout.
LITERAL = [
    *((family, *rest) for family in FAMILIES for rest in ((3, 0.1, 48), (1, 0.1, 0))),
    *(("gptj", *rest) for rest in ((1, 0.1, 48), (3, 0.1, 0), (3, 0.0, 48), (1, 0.0, 48))),
]


@pytest.mark.parametrize(("family", "n_requests", "contrast", "doubled"), LITERAL)
def test_pac_equals_the_literal_dense_algorithm(
    family, n_requests, contrast, doubled, make_model, requests, monkeypatch
):
    monkeypatch.setattr(pac, "DOUBLED_TOKENS", doubled)  # one pass for both losses, or two
    model = make_model(family)
    chosen = requests[:n_requests]
    hparams = HPARAMS | {"lambda": contrast}
    if contrast == 0.0:
        expected, _ = literal_pac(model, chosen, hparams | {"negatives": 0}, model.n_layers)
    else:
        expected, _ = literal_pac(model, chosen, hparams, model.n_layers)
    editor = build_editor("pac", hparams | {"trace_on": "current", "micro_batch": 2}, {})
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    delta = editor.edit(model, chosen)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    model.apply(delta)
    for name, weight in expected.items():
        torch.testing.assert_close(
            model.parameter(name).detach(), weight, rtol=1e-6, atol=1e-8, msg=name
        )
    assert editor.steps == hparams["steps"]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_each_request_stops_by_itself_and_goes_on_when_disturbed(family, make_model, requests):
    model = make_model(family)
    changes = {"steps": 40, "tolerance": 3.5, "paths": 8, "learning_rate": 0.03}
    hparams = HPARAMS | changes
    expected, stepped = literal_pac(model, requests, hparams, model.n_layers)
    sizes = [len(learning) for learning in stepped]
    assert sizes[0] == len(requests)
    assert min(sizes) < len(requests)
    if family == "gpt2":  # here somebody is disturbed after it was learnt
        assert any(after > before for before, after in itertools.pairwise(sizes))
    editor = build_editor("pac", hparams | {"trace_on": "current", "micro_batch": 2}, {})
    model.apply(editor.edit(model, requests))
    assert editor.steps == len(stepped)
    for name, weight in expected.items():
        torch.testing.assert_close(model.parameter(name).detach(), weight, rtol=1e-6, atol=1e-8)


def test_only_segments_on_the_paths_change(make_model, requests):
    model = make_model("gptj")
    delta = build_editor("pac", HPARAMS | {"trace_on": "current"}, {}).edit(model, requests[:1])
    n_segments = HPARAMS["paths"] + HPARAMS["negatives"]
    assert len(delta) == 3 * model.n_layers  # W1, its bias, W2
    assert all(len(part.index) == n_segments for part in delta.values())


@pytest.mark.parametrize("scope", ["edit", "batch"])
def test_cached_paths_give_the_same_edit_as_live_tracing(scope, make_model, requests, tmp_path):
    model = make_model("gptj")
    cache_gradients(Parts(tmp_path / "g.safetensors", {}), model, requests)
    cache = GradientCache.open(tmp_path / "g.safetensors")
    need = Paths("l2", len(requests) if scope == "batch" else 1, "disjoint", 3, 2)
    write_paths(tmp_path / "p.safetensors", select_groups(cache, need), cache, need)
    hparams = HPARAMS | {"scope": scope}
    live = build_editor("pac", hparams | {"trace_on": "current"}, {}).edit(model, requests)
    editor = build_editor("pac", hparams, {"paths": tmp_path / "p.safetensors"})
    cached = editor.edit(model, requests)
    for name, part in live.items():
        assert torch.equal(part.index, cached[name].index)
        torch.testing.assert_close(part.values, cached[name].values)
    assert editor.stopwatch.seconds["trace"] > 0
    longer = [replace(request, target_new=request.target_new * 9) for request in requests]
    with pytest.raises(EditError, match=r"request 'a' has .* in .*/p\.safetensors were made with"):
        editor.edit(model, longer)


def test_no_more_requests_are_traced_at_once_than_are_to_be(make_model, requests, monkeypatch):
    traced = []

    def counted(model, some):
        traced.append(len(some))
        return trace(model, some)

    monkeypatch.setattr(pac, "trace", counted)
    editor = build_editor("pac", HPARAMS | {"trace_on": "current", "steps": 1}, {})
    editor(make_model("llama"), requests[:3], micro_batch=2)
    assert sum(traced) == 3
    assert max(traced) <= 2


def test_a_diverging_edit_names_the_request(make_model, requests):
    model = make_model("llama")
    editor = build_editor("pac", HPARAMS | {"trace_on": "current", "learning_rate": 1e300}, {})
    with pytest.raises(EditError, match=r"pac: the loss of request 'a' became NaN.*learning_rate"):
        editor.edit(model, requests[:1])


def test_bfloat16_edits_accumulate_in_float32(make_model, requests):
    model = make_model("llama", torch.bfloat16)
    editor = build_editor("pac", HPARAMS | {"trace_on": "current", "learning_rate": 1e-4}, {})
    for _ in range(3):
        model.apply(editor.edit(model, requests[:1]))
    total = model.edits.total().weights
    assert all(part.values.dtype == torch.float32 for part in total.values())
    moved = max(float(part.values.abs().max()) for part in total.values())
    assert 5e-4 < moved <= 15 * 1.01e-4  # 15 Adam steps of 1e-4, far below bfloat16's spacing


@pytest.mark.parametrize("scope", ["edit", "batch"])
def test_abs_zscore_selects_by_whole_gradients(scope, make_model, requests):
    model = make_model("llama")
    hparams = HPARAMS | {"trace_on": "current", "score": "abs_zscore", "scope": scope, "steps": 1}
    for parameter in model.model.parameters():
        parameter.requires_grad_(True)
    gradients = []
    for request in requests:
        model.model.zero_grad()
        (item,) = model.encode([(request.filled_prompt, request.target_new)])
        logits = model.model(torch.tensor([item.ids])).logits[0, -item.n_target - 1 : -1]
        cross_entropy(logits, torch.tensor(item.target_ids)).backward()
        gradients.append([f.value.weight.grad.clone() for f in model.ffn])  # [D, M]
    model.model.requires_grad_(False)
    model.model.zero_grad()
    if scope == "batch":
        gradients = [[sum(g) for g in zip(*gradients, strict=True)]]
    delta = build_editor("pac", hparams | {"lambda": 0.0}, {}).edit(model, requests)
    for layer, ffn in enumerate(model.ffn):
        chosen = set()
        for gradient in (g[layer] for g in gradients):
            z = (gradient - gradient.mean(1, keepdim=True)) / gradient.std(1, keepdim=True)
            chosen |= set(z.abs().mean(0).topk(3).indices.tolist())
        assert set(delta[ffn.value.weight_name].index.tolist()) == chosen


def test_abs_zscore_is_not_cached(make_model, requests):
    editor = build_editor("pac", HPARAMS | {"score": "abs_zscore"}, {})
    with pytest.raises(ConfigError, match=r"abs_zscore needs whole gradients.*trace_on: current"):
        editor.edit(make_model("llama"), requests)
