"""Natural PAC against autograd and dense algebra, and what it remembers."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.editors.contexts import prefixes
from kmebench.editors.locate.covariance.factors import cache_factor
from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.editors.losses import target_losses
from kmebench.editors.needs import Covariance, Inverse, NeutralMetric
from kmebench.editors.pac.gradients import KEY, VALUE
from kmebench.editors.pac.neighbours import SUBJECTS, neighbours
from kmebench.editors.pac.neutral import read_metric, write_metric
from kmebench.editors.pac.texts import Texts
from kmebench.errors import ConfigError, EditError
from kmebench.models.encoding import SubjectText
from tests.conftest import SOME_FAMILIES

LAYERS = (0, 1)
PLAIN = {"layers": LAYERS, "contexts": 0, "memory": 0, "positions": "all", "steps": 1}


@pytest.fixture
def assets(tmp_path):
    """The files of all stages that the editor may read, of a model."""

    def make(model):
        need = NeutralMetric(LAYERS, 600)
        files = {
            NeutralMetric.asset: tmp_path / "metric",
            Covariance.asset: tmp_path / "covariance",
        }
        write_metric(files[NeutralMetric.asset], model, need)
        settings = TextSettings(tokens=600, length=30, batch_size=10)
        measure_covariance(files[Covariance.asset], model, LAYERS, settings)
        for layer in LAYERS:
            factor = Inverse(layer, 0.003)
            files[factor.key] = tmp_path / factor.key
            cache_factor(files[factor.key], files[Covariance.asset], factor.factor, layer)
        return files

    return make


def damped(moment, epsilon):
    moment = moment.double()
    return moment + epsilon * moment.diagonal().mean() * torch.eye(len(moment)).double()


def sides(files, layer, matrix):
    """Residual side and segment side of a matrix, dense."""
    moments = read_metric(files[NeutralMetric.asset], layer)
    if matrix == KEY:
        inner = moments.inner.double()
        return damped(moments.inputs, 0.1), torch.diag(inner + 0.003 * inner.mean())
    return damped(moments.outputs, 0.1), damped(
        Covariances.open(files[Covariance.asset]).of(layer), 0.003
    )


def by_autograd(model, request):
    """Loss of a request, and by matrix its gradient, [D, M]."""
    (encoded,) = model.encode([(request.filled_prompt, request.target_new)])
    names = {}
    for layer in LAYERS:
        for matrix, projection in enumerate((model.ffn[layer].key, model.ffn[layer].value)):
            names[layer, matrix] = projection
            projection.weight.requires_grad_()
    batch = model.collate([encoded])
    loss = cross_entropy(model.answer_logits(batch), batch.labels)
    loss.backward()
    gradients = {}
    for key, projection in names.items():
        gradient = projection.segments(projection.weight.grad, projection.axis)
        gradients[key] = gradient if projection.axis == 1 else gradient.T
        projection.weight.requires_grad_(False)
        projection.weight.grad = None
    return float(loss.detach()), gradients


def changes(model, delta):
    """By matrix, the change [D, M] of a delta."""
    found = {}
    for layer in LAYERS:
        for matrix, projection in enumerate((model.ffn[layer].key, model.ffn[layer].value)):
            if projection.weight_name in delta:
                part = delta[projection.weight_name].dense(projection.weight.shape)
                part = projection.segments(part, projection.axis)
                found[layer, matrix] = part if projection.axis == 1 else part.T
    return found


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("step", ["mean", "each"])
def test_a_step_is_the_natural_gradient_to_where_the_loss_vanishes(
    make_model, requests, assets, family, step
):
    model = make_model(family)
    files = assets(model)
    values = PLAIN | {"matrices": "both", "nats": 1e9, "step": step, "step_damping": 0}
    found = changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
    loss, gradients = by_autograd(model, requests[0])
    directions, square = {}, 0.0
    for key, gradient in gradients.items():
        residual, inner = sides(files, *key)
        directions[key] = torch.linalg.solve(residual, gradient) @ torch.linalg.inv(inner)
        square += float((gradient * directions[key]).sum())
    assert found.keys() == directions.keys()
    for key, direction in directions.items():
        torch.testing.assert_close(found[key], -loss / square * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("step", ["mean", "each"])
def test_a_relaxed_step_goes_on_where_the_linearised_loss_vanishes(
    make_model, requests, assets, step
):
    model = make_model("llama")
    files = assets(model)
    plain, relaxed = (
        changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
        for values in (
            PLAIN | {"nats": 1e9, "step": step, "relaxation": relaxation} for relaxation in (1, 2.5)
        )
    )
    for key, change in plain.items():
        torch.testing.assert_close(relaxed[key], 2.5 * change)


def test_the_longest_step_costs_all_its_nats(make_model, requests, assets):
    model = make_model("llama")
    files = assets(model)
    nats = 3.0  # more than the step to where the loss vanishes costs
    values = PLAIN | {"nats": nats, "step": "longest"}
    found = changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
    cost = 0.0
    for key, change in found.items():
        residual, inner = sides(files, *key)
        cost += float((change * (residual @ change @ inner)).sum()) / 2
    assert cost == pytest.approx(nats)


@pytest.mark.parametrize("paths", [None, 4])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_adam_steps_as_torch_does_on_the_chosen_segments(
    make_model, requests, assets, family, paths
):
    model = make_model(family)
    values = PLAIN | {"matrices": "both", "step": "adam", "learning_rate": 0.01, "steps": 3}
    values |= {"paths": paths, "tolerance": 0}
    edit = build_editor("npac", values, assets(model))(model, requests[:1]).edit
    found = changes(model, edit.weights)
    total = {key: torch.zeros_like(change) for key, change in found.items()}
    adam = torch.optim.Adam(total.values(), lr=0.01)
    start = {name: model.parameter(name).detach().clone() for name in edit.weights}
    for _ in range(3):
        _, gradients = by_autograd(model, requests[0])
        for key, change in total.items():
            change.grad = gradients[key] * found[key].any(dim=0)
        adam.step()
        with torch.no_grad():
            for key, change in total.items():
                projection = (model.ffn[key[0]].key, model.ffn[key[0]].value)[key[1]]
                weight = projection.weight
                weight.copy_(start[projection.weight_name])
                part = change if projection.axis == 1 else change.T
                projection.segments(weight, projection.axis).add_(part)
    for key, change in total.items():
        assert paths is None or int(found[key].any(dim=0).sum()) == paths
        torch.testing.assert_close(found[key], change, rtol=1e-6, atol=1e-9)


def test_the_subjects_last_token_alone_writes(make_model, requests, assets):
    model = make_model("llama")
    files = assets(model)
    values = PLAIN | {"positions": "subject_last"}
    found = changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
    (text,) = model.encode_subjects([SubjectText.of(requests[0], "", requests[0].target_new)])
    seen = {}
    modules = [model.ffn[layer].value.module for layer in LAYERS]
    handles = [
        m.register_forward_pre_hook(lambda _, x, m=m: seen.__setitem__(m, x[0][0])) for m in modules
    ]
    model.answer_logits(model.collate([text]))
    for handle in handles:
        handle.remove()
    for layer, module in zip(LAYERS, modules, strict=True):
        _, inner = sides(files, layer, VALUE)
        key = torch.linalg.solve(inner, seen[module][text.subject_last])
        change = found[layer, VALUE]  # rank one: along the key of that token
        torch.testing.assert_close(change, torch.outer(change @ key, key) / (key @ key))


@pytest.mark.parametrize("choice", [{"paths": 4}, {"share": 0.3}])
def test_what_is_not_chosen_is_not_moved(make_model, requests, assets, choice):
    model = make_model("llama")
    files = assets(model)
    values = PLAIN | {"matrices": "both"} | choice
    found = changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
    _, gradients = by_autograd(model, requests[0])
    prices = {}
    for key, gradient in gradients.items():
        residual, inner = sides(files, *key)
        solved = torch.linalg.solve(residual, gradient)
        prices[key] = (gradient * solved).sum(dim=0) / inner.diagonal()
    ranked = sorted(
        ((float(p), key, j) for key, ps in prices.items() for j, p in enumerate(ps)), reverse=True
    )
    if "share" in choice:
        total, wanted, held = sum(p for p, _, _ in ranked), set(), 0.0
        for price, key, j in ranked:
            if held >= 0.3 * total:
                break
            wanted.add((key, j))
            held += price
    else:
        wanted = {
            (key, j) for key in prices for j in prices[key].argsort(descending=True)[:4].tolist()
        }
    moved = {
        (key, j)
        for key, part in found.items()
        for j in part.any(dim=0).nonzero().flatten().tolist()
    }
    assert moved == wanted


def test_chosen_segments_of_w2_take_their_own_block(make_model, requests, assets):
    model = make_model("llama")
    files = assets(model)
    values = PLAIN | {"paths": 5, "nats": 1e9}
    found = changes(model, build_editor("npac", values, files)(model, requests[:1]).edit.weights)
    loss, gradients = by_autograd(model, requests[0])
    directions, square = {}, 0.0
    for key, change in found.items():
        index = change.any(dim=0).nonzero().flatten()
        assert len(index) == 5
        residual, inner = sides(files, *key)
        gradient, block = gradients[key][:, index], inner[index][:, index]
        directions[key] = index, torch.linalg.solve(residual, gradient) @ torch.linalg.inv(block)
        square += float((gradient * directions[key][1]).sum())
    for key, (index, direction) in directions.items():
        torch.testing.assert_close(found[key][:, index], -loss / square * direction)


@pytest.mark.parametrize("together", [1, 3])
def test_no_step_of_a_request_costs_more_than_its_nats(make_model, requests, assets, together):
    model = make_model("llama")
    files = assets(model)
    values = PLAIN | {"nats": 1e-6}
    editor = build_editor("npac", values, files)
    found = changes(model, editor(model, requests[:together]).edit.weights)
    cost = 0.0
    for key, change in found.items():
        residual, inner = sides(files, *key)
        cost += float((change.T @ residual @ change * inner).sum()) / 2
    assert cost == pytest.approx(1e-6 * together)


def test_an_edit_lowers_the_loss_and_leaves_the_model_as_it_was(trained, capital_requests, assets):
    files, requests = assets(trained), capital_requests[:3]
    before = {n: p.clone() for n, p in trained.model.named_parameters()}
    # Facts of a model this small stand nowhere by themselves.
    values = {"layers": LAYERS, "contexts": 0, "positions": "all", "matrices": "both", "steps": 12}
    result = build_editor("npac", values, files)(trained, requests)
    assert all(torch.equal(p, before[n]) for n, p in trained.model.named_parameters())
    assert result.steps == 12
    batch = trained.collate(trained.encode([(r.filled_prompt, r.target_new) for r in requests]))
    loss = lambda: cross_entropy(trained.answer_logits(batch), batch.labels)  # noqa: E731
    start = loss()
    with trained.edits.savepoint():
        trained.apply(result.edit)
        assert loss() < start / 2


@pytest.mark.parametrize("positions", ["subject_last", "from_subject", "all"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_fresh_reading_is_that_of_the_whole_texts(
    make_model, requests, assets, family, positions
):
    model = make_model(family)
    before = ("", "Some words. ", "And many other words before. ")
    encoded = model.encode_subjects(
        [SubjectText.of(r, text, r.target_new) for r in requests for text in before]
    )
    editor = build_editor("npac", {"layers": LAYERS, "positions": positions}, assets(model))
    texts = Texts(model, encoded, 3, editor.hparams, micro_batch=2)
    model.apply(editor(model, requests[:1]).edit)
    stale = texts.read().losses
    texts.renew()
    wanted = target_losses(model, encoded).detach()
    torch.testing.assert_close(texts.read().losses, wanted)
    first = [item.subject_last == 0 for item in encoded]
    alone = torch.tensor([positions == "all" or x for x in first]) & (min(LAYERS) == 0)
    assert torch.equal((stale - wanted).abs() < 1e-12, alone)


def test_a_fresh_reading_ends_an_edit(trained, capital_requests, assets, monkeypatch):
    happened = []

    class Noted(Texts):
        def renew(self):
            happened.append("renewed")
            super().renew()

    monkeypatch.setattr("kmebench.editors.pac.npac.Texts", Noted)
    apply = trained.apply
    monkeypatch.setattr(trained, "apply", lambda edit: (happened.append("moved"), apply(edit)))
    for steps in (1, 30):
        values = {"layers": LAYERS, "contexts": 2, "steps": steps}
        happened.clear()
        result = build_editor("npac", values, assets(trained))(trained, capital_requests[:1])
        assert happened.count("moved") == result.steps >= 1
        assert happened[0] == happened[-1] == "renewed"


def test_an_edit_ends_below_the_tolerance_and_no_earlier(trained, capital_requests, assets):
    files, request = assets(trained), capital_requests[0]
    # Facts of a model this small stand nowhere by themselves.
    values = {"layers": LAYERS, "contexts": 2, "positions": "all", "matrices": "both"}

    def loss_after(steps, tolerance=0):
        chosen = values | {"steps": steps, "tolerance": tolerance}
        editor = build_editor("npac", chosen, files)
        result = editor(trained, [request])
        before = prefixes(editor.contexts(trained))
        texts = [SubjectText.of(request, text, request.target_new) for text in before]
        with trained.edits.savepoint():
            trained.apply(result.edit)
            losses = target_losses(trained, trained.encode_subjects(texts)).detach()
        return float(losses.mean()), result.steps

    tolerance = 0.7 * loss_after(0)[0]
    loss, steps = loss_after(50, tolerance)
    assert 1 <= steps < 50
    assert loss < tolerance <= loss_after(steps - 1)[0]


def test_what_is_learnt_costs_no_step(make_model, requests, assets):
    model = make_model("llama")
    files = assets(model)
    editor = build_editor("npac", {"layers": LAYERS, "tolerance": 1e9}, files)
    result = editor(model, requests)
    assert result.steps == 0
    assert not result.edit.weights


@pytest.mark.parametrize("choice", [{}, {"matrices": "both", "paths": 4}])
def test_later_edits_keep_what_earlier_ones_used(make_model, requests, assets, choice):
    model = make_model("llama")
    files = assets(model)
    values = {"layers": LAYERS, "steps": 1, "contexts": 0, "memory": 0.5, "nats": 1e9}
    editor = build_editor("npac", values | choice, files)
    first = editor(model, requests[:1]).edit
    model.apply(first)
    second = editor(model, requests[1:2]).edit
    forgetful = build_editor("npac", values | choice | {"memory": 0}, files)
    other = forgetful(model, requests[1:2]).edit
    used = editor.state_dict()["kept.0.1"][0]
    name = model.ffn[0].value.weight_name
    moved, would = (
        e.weights[name].dense(model.parameter(name).shape) @ used for e in (second, other)
    )
    assert moved.norm() < 0.5 * would.norm()


def test_all_texts_of_an_edit_together_count_once_in_the_memory(make_model, requests, assets):
    model = make_model("llama")
    values = {"layers": LAYERS, "steps": 1, "contexts": 3, "memory": 0.5}
    editor = build_editor("npac", values, assets(model))
    editor(model, requests[:1])
    texts = editor.state_dict()["kept.0.1"]
    before = prefixes(editor.contexts(model))
    encoded = model.encode_subjects(
        [SubjectText.of(requests[0], text, requests[0].target_new) for text in before]
    )
    inputs = []
    module = model.ffn[0].value.module
    handle = module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    with model.edits.savepoint():
        model.apply(build_editor("npac", values, assets(model))(model, requests[:1]).edit)
        inputs.clear()
        model.answer_logits(model.collate(encoded))
    handle.remove()
    rows = torch.stack([inputs[0][i, e.subject_last] for i, e in enumerate(encoded)])
    torch.testing.assert_close(texts.T @ texts, 0.5 * rows.T @ rows / 4)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_what_the_prompt_reads_of_other_subjects_counts_in_the_metric(
    make_model, requests, assets, family
):
    model = make_model(family)
    files = assets(model)
    values = PLAIN | {"nats": 1e9, "neighbours": 2, "neighbour_weight": 0.7, "micro_batch": 1}
    editor = build_editor("npac", values, files)
    request = requests[1]  # the subject stands inside the prompt
    found = changes(model, editor(model, [request]).edit.weights)
    inputs = {layer: [] for layer in LAYERS}
    handles = [
        model.ffn[layer].value.module.register_forward_pre_hook(
            lambda _, x, layer=layer: inputs[layer].append(x[0][0].detach())
        )
        for layer in LAYERS
    ]
    for subject in SUBJECTS[:2]:
        text = request.prompt.replace("{}", subject)
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        model.model(ids)
        before = model.tokenizer(text[: text.index(subject) + len(subject)]).input_ids
        for layer in LAYERS:
            inputs[layer][-1] = inputs[layer][-1][len(before) - 1 :]
    for handle in handles:
        handle.remove()
    loss, gradients = by_autograd(model, request)
    directions, square = {}, 0.0
    for layer in LAYERS:
        residual, inner = sides(files, layer, VALUE)
        rows = torch.cat(inputs[layer]).double()
        inner = inner + 0.7 * rows.T @ rows
        gradient = gradients[layer, VALUE]
        directions[layer] = torch.linalg.solve(residual, gradient) @ torch.linalg.inv(inner)
        square += float((gradient * directions[layer]).sum())
    for layer, direction in directions.items():
        wanted = -loss / square * direction
        torch.testing.assert_close(found[layer, VALUE], wanted, rtol=1e-6, atol=1e-9)
    again = editor(model, [request]).edit  # of this edit alone: nothing is kept
    assert all(torch.equal(changes(model, again.weights)[key], part) for key, part in found.items())


def test_a_subject_is_no_neighbour_of_itself(requests):
    request = dataclasses.replace(requests[0], subject="paris")
    texts = neighbours(request, len(SUBJECTS) - 1)
    assert [text.subject for text in texts] == [s for s in SUBJECTS if s != "Paris"]
    assert {(text.prompt, text.target) for text in texts} == {(request.prompt, request.target_new)}
    with pytest.raises(ConfigError, match="neighbours"):
        build_editor("npac", {"neighbours": len(SUBJECTS)}, {})


def test_contexts_have_as_many_tokens_as_are_asked_for(make_model, requests, assets):
    model = make_model("llama")
    values = {"layers": LAYERS, "steps": 0, "contexts": 2, "context_tokens": 3}
    editor = build_editor("npac", values, assets(model))
    assert editor.lengths == ((3, 2),)
    assert len(prefixes(editor.contexts(model))) == 3


@pytest.mark.parametrize("positions", ["subject_last", "from_subject", "all"])
def test_positions_begin_and_end_where_their_name_says(make_model, requests, assets, positions):
    model = make_model("llama")
    values = PLAIN | {"positions": positions, "memory": 0.5}
    editor = build_editor("npac", values, assets(model))
    editor(model, requests[1:2])
    request = requests[1]  # the subject stands inside the prompt, and the target has many tokens
    (text,) = model.encode_subjects([SubjectText.of(request, "", request.target_new)])
    end = len(text.ids) - 1  # the last token of the target is never an input
    wanted = {"subject_last": 1, "from_subject": end - text.subject_last, "all": end}[positions]
    assert 0 < text.subject_last < end - 1
    assert len(editor.state_dict()["kept.0.1"]) == wanted


def test_segments_are_chosen_once_for_an_edit(make_model, requests, assets):
    model = make_model("llama")
    values = PLAIN | {"paths": 4, "steps": 4}
    result = build_editor("npac", values, assets(model))(model, requests[:1])
    assert result.steps == 4
    moved = changes(model, result.edit.weights).values()
    assert [int(part.any(dim=0).sum()) for part in moved] == [4, 4]


def test_two_ways_to_choose_segments_are_refused():
    with pytest.raises(ConfigError, match="paths and share both choose segments; set one of them"):
        build_editor("npac", {"paths": 3, "share": 0.5}, {})


def test_after_a_step_that_raised_the_loss_the_next_may_cost_a_quarter(
    trained, capital_requests, assets
):
    files, seen = assets(trained), []
    values = {"layers": LAYERS, "contexts": 0, "positions": "all", "matrices": "both", "steps": 8}
    editor = build_editor("npac", values, files)
    stepper = editor._stepper

    def noting(*arguments):
        step = stepper(*arguments)

        def noted(gradients, losses, each, nats):
            delta, cost = step(gradients, losses, each, nats)
            seen.append((float(losses.mean()), nats, cost))
            return delta, cost

        return noted

    editor._stepper = noting
    editor(trained, capital_requests[:1])
    pairs = list(itertools.pairwise(seen))
    raised = [(cost, bound) for (loss, _, cost), (now, bound, _) in pairs if now > loss]
    assert raised
    assert all(bound == cost / 4 for cost, bound in raised)


def test_a_resumed_editor_makes_the_same_bits(make_model, requests, assets):
    model = make_model("llama", dtype=torch.float32)
    files = assets(model)
    for choice in ({}, {"matrices": "both", "paths": 6}):
        values = {"layers": LAYERS, "steps": 2} | choice
        editor = build_editor("npac", values, files)
        for request in requests[:2]:
            editor(model, [request])
        resumed = build_editor("npac", values, files)
        resumed.load_state_dict({k: v.clone() for k, v in editor.state_dict().items()})
        one, two = (e(model, requests[2:]).edit.weights.tensors() for e in (editor, resumed))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_kept_stays_bounded_and_weighs_the_same(make_model, requests, assets, monkeypatch):
    """Many edits: their inputs become as many rows as can be independent, with the same RᵀR."""
    model = make_model("llama")
    files = assets(model)
    values = {"layers": LAYERS, "steps": 1, "contexts": 2, "positions": "all"}
    every, bounded = (build_editor("npac", values, files) for _ in range(2))
    place, most = "kmebench.editors.pac.npac.MOST_KEPT", 0
    for i in range(9):
        monkeypatch.setattr(place, 1000)
        wanted = every(model, [requests[i % 3]]).edit.weights
        monkeypatch.setattr(place, 1)
        edit = bounded(model, [requests[i % 3]]).edit.weights
        for name, part in wanted.items():
            shape = model.parameter(name).shape
            torch.testing.assert_close(
                edit[name].dense(shape), part.dense(shape), rtol=1e-8, atol=1e-12
            )
        rows, width = bounded.state_dict()["kept.0.1"].shape
        most = max(most, rows)
    assert len(every.state_dict()["kept.0.1"]) > 2 * width >= most
    resumed = build_editor("npac", values, files)
    resumed.load_state_dict({k: v.clone() for k, v in bounded.state_dict().items()})
    one, two = (e(model, requests[:1]).edit.weights.tensors() for e in (bounded, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_layers_that_are_not_there_are_refused(make_model, requests, assets):
    model = make_model("llama")
    editor = build_editor("npac", {"layers": (1, 9)}, assets(model))
    with pytest.raises(ConfigError, match=r"npac: layers \[1, 9\] are not all among .* 0 to 2"):
        editor(model, requests[:1])


def test_a_layer_that_no_later_token_reads_is_refused(make_model, requests, assets, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr("tests.editors.pac.test_npac.LAYERS", (2,))
    editor = build_editor("npac", {"layers": (2,), "contexts": 0}, assets(model))
    with pytest.raises(
        EditError, match=r"npac: the loss does not depend on layers \[2\] .* earlier"
    ):
        editor(model, requests[:1])


def test_an_infinite_loss_is_refused(make_model, requests, assets):
    model = make_model("llama")
    files = assets(model)
    model.parameter(model.ffn[1].value.weight_name).data.fill_(torch.nan)
    with pytest.raises(EditError, match=r"npac: the loss of request 'a' .* lower nats"):
        build_editor("npac", {"layers": LAYERS, "contexts": 0}, files)(model, requests[:1])
