"""PAC on the released schedule against the released schedule done literally, with dense weights."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.pac import released as pac_released
from kmebench.errors import EditError
from tests.conftest import FAMILIES, SOME_FAMILIES

HPARAMS = {"paths": 3, "negatives": 2, "learning_rate": 0.01, "epochs": 5, "mini_batch": 2}


@pytest.fixture
def exact_norms(monkeypatch):
    """Llama's RMSNorm computes in float32 whatever the dtype; Adam magnifies that noise."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def dense_loss(model, weights, items, labels):
    """Mean cross-entropy over all target tokens of the items."""
    losses = []
    for item, label in zip(items, labels, strict=True):
        logits = torch.func.functional_call(
            model.model, weights, kwargs={"input_ids": torch.tensor([item.ids])}
        ).logits[0, -item.n_target - 1 : -1]
        losses.append(cross_entropy(logits, torch.as_tensor(label), reduction="none"))
    return torch.cat(losses).mean()


def literal(model, requests, hparams):
    """One Adam over whole weights, whole gradients, masks; returns weights and all masks."""
    paths, negatives = hparams["paths"], hparams["negatives"]
    items = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    matrices, key_bias, value_bias, offsets = {}, {}, [], {}
    for ffn in model.ffn:
        for projection in (ffn.key, ffn.value):
            matrices[projection.weight_name] = projection.axis
            offsets[projection.weight_name] = projection.offset
            if projection.bias_name and projection is ffn.key:
                key_bias[projection.bias_name] = projection.weight_name
            elif projection.bias_name:
                value_bias.append(projection.bias_name)
    names = [*matrices, *key_bias, *value_bias]
    weights = {n: model.parameter(n).clone().requires_grad_() for n in names}
    with torch.no_grad():
        own = [
            model.model(torch.tensor([i.ids])).logits[0, -i.n_target - 1 : -1].argmax(-1)
            for i in items
        ]
    first = torch.optim.Adam(weights.values(), lr=hparams["learning_rate"])
    second = torch.optim.Adam(weights.values(), lr=hparams["learning_rate"])
    if hparams.get("shared_state", True):
        second = first
    masks, best, worst = [], {}, {}
    for epoch in range(hparams["epochs"]):
        if epoch % 2 == 0:
            total = {n: torch.zeros_like(w) for n, w in weights.items()}
            for start in range(0, len(items), 2):
                some = items[start : start + 2]
                loss = dense_loss(model, weights, some, [i.target_ids for i in some])
                for name, part in zip(
                    names, torch.autograd.grad(loss, list(weights.values())), strict=True
                ):
                    total[name] += part
            for name, axis in matrices.items():
                gradient = total[name] if axis == 1 else total[name].T  # [D, M]
                gradient = gradient[:, offsets[name] :]
                z = (gradient - gradient.mean(1, keepdim=True)) / gradient.std(1, keepdim=True)
                order = z.abs().mean(0).argsort(descending=True)
                best[name], worst[name] = order[:paths], order.flip(0)[:negatives]
            masks.append({n: (set(best[n].tolist()), set(worst[n].tolist())) for n in matrices})
        for chunk in torch.randperm(len(items)).split(2):
            some = [items[i] for i in chunk]
            for adam, chosen, labels, factor in (
                (first, best, [i.target_ids for i in some], 1.0),
                (second, worst, [own[i] for i in chunk], hparams["lambda"]),
            ):
                if factor == 0:
                    continue
                adam.zero_grad()
                (factor * dense_loss(model, weights, some, labels)).backward()
                for name, axis in (*matrices.items(), *((n, 0) for n in key_bias)):
                    keep = torch.zeros_like(weights[name])
                    index = chosen[key_bias.get(name, name)] + offsets.get(name, 0)
                    keep.movedim(axis, 0)[index] = 1
                    weights[name].grad *= keep
                if chosen is worst and hparams.get("second_step") == "momentum":
                    for weight in weights.values():
                        weight.grad.zero_()
                adam.step()
    return weights, masks


def five(requests):
    """Three requests and two more, so that mini-batches are uneven."""
    return [
        *requests,
        EditRequest("d", "Japan", "Mount Fuji stands in {}, and", "Italy", "the", (), ()),
        EditRequest("e", "Paris", "The Seine flows through {} in", "Japan", "France", (), ()),
    ]


@pytest.mark.parametrize(
    ("family", "variation"),
    [
        *((family, {"lambda": 0.1}) for family in SOME_FAMILIES),
        ("phi3", {"lambda": 0.1}),  # it keeps the gate beside the keys
        ("gptj", {"lambda": 0.0}),
        ("gptj", {"lambda": 0.1, "shared_state": False}),
        ("gptj", {"lambda": 0.1, "second_step": "momentum"}),
    ],
)
def test_the_trajectory_is_that_of_the_dense_code(
    family, variation, make_model, requests, exact_norms, monkeypatch
):
    model = make_model(family)
    hparams = HPARAMS | variation
    torch.manual_seed(3)
    weights, masks = literal(model, five(requests), hparams)
    assert len(masks) == 3
    assert masks[0] != masks[-1]  # re-scoring changes something

    seen = []

    select_paths = pac_released.select_paths

    def spy(*args):
        paths = select_paths(*args)
        names = [p.weight_name for f in model.ffn for p in (f.key, f.value)]
        places = [(layer, m) for layer in range(model.n_layers) for m in (0, 1)]
        seen.append(
            {
                n: (set(paths.positive[0][p].tolist()), set(paths.negative[0][p].tolist()))
                for n, p in zip(names, places, strict=True)
            }
        )
        return paths

    monkeypatch.setattr(pac_released, "select_paths", spy)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    torch.manual_seed(3)
    editor = build_editor("pac-released", hparams | {"layers_per_pass": 2}, {})
    delta = editor.edit(model, five(requests))
    assert seen == masks
    assert editor.steps == 5 * 3 * (2 if variation["lambda"] else 1)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    model.apply(delta)
    for name, weight in weights.items():
        # GPT-J's attention computes in float32: single entries may differ by its rounding.
        change = weight.detach() - before[name]
        assert change.norm() > 0.01
        assert (model.parameter(name) - weight).norm() < 1e-6 * change.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_from_the_masters_of_earlier_edits(family, make_model, requests):
    """In bfloat16 the live weight is rounded; the second edit must not lose what was rounded."""
    model = make_model(family, torch.bfloat16)
    editor = build_editor("pac-released", HPARAMS | {"epochs": 2, "learning_rate": 1e-6}, {})
    total = {}
    for request in requests:
        delta = editor.edit(model, [request])
        live = {n: model.parameter(n).clone() for n in delta}
        masters = {n: model.edits.master(n) for n in delta}
        model.apply(delta)
        for name, part in delta.items():
            change = part.dense(masters[name].shape)
            torch.testing.assert_close(model.edits.master(name), masters[name] + change)
            total[name] = total.get(name, 0) + change
            assert live[name].dtype == torch.bfloat16
    whole = model.edits.total().weights
    for name, change in total.items():
        torch.testing.assert_close(whole[name].dense(change.shape), change, rtol=1e-4, atol=1e-8)
        assert change.abs().max() > 0


def test_memory_follows_the_segments_ever_selected(make_model, requests):
    model = make_model("gptj", width=200)
    delta = build_editor("pac-released", HPARAMS, {}).edit(model, requests)
    for part in (delta[p.weight_name] for f in model.ffn for p in (f.key, f.value)):
        assert len(part.index) <= 3 * (3 + 2)


def test_a_diverging_run_is_one_sentence(make_model, requests):
    editor = build_editor("pac-released", HPARAMS | {"learning_rate": 1e308}, {})
    with pytest.raises(EditError, match=r"pac-released: the loss of request '\w' .* at step"):
        editor.edit(make_model("llama"), requests)
