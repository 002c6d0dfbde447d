"""The neutral metric against plain autograd, exact Fisher matrices and measured KL divergences."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.needs import NeutralMetric
from kmebench.editors.pac import neutral
from kmebench.editors.pac.neutral import measure, read_metric, write_metric
from kmebench.errors import EditError
from kmebench.models.sampling import sample
from tests.conftest import SOME_FAMILIES


def activations(model, layer, row):
    """Inputs and output gradients of both matrices for a text, at all but its last token."""
    seen = {}
    projections = (model.ffn[layer].key, model.ffn[layer].value)

    def note(matrix):
        def hook(_module, inputs, output):
            output.retain_grad()
            seen[matrix] = inputs[0], output

        return hook

    handles = [p.module.register_forward_hook(note(m)) for m, p in enumerate(projections)]
    embedded = model.model.get_input_embeddings()(row[None, :-1]).requires_grad_()
    logits = model.model(inputs_embeds=embedded).logits[0]
    cross_entropy(logits, row[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    (x1, y1), (x2, y2) = seen[0], seen[1]
    return [(x1[0].detach(), projections[0].segments(y1.grad[0], -1)), (x2[0].detach(), y2.grad[0])]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_moments_are_means_over_the_tokens_of_all_texts(make_model, monkeypatch, family):
    monkeypatch.setattr(neutral, "METRIC_ROWS", 2)
    model = make_model(family)
    text = sample(model, 5, 7, seed=1)
    found = measure(model, text, [0, 2])
    for layer, moments in found.items():
        pairs = [activations(model, layer, row) for row in text]
        x, g1, g2 = (
            torch.cat([pair[m][side] for pair in pairs]) for m, side in ((0, 0), (0, 1), (1, 1))
        )
        n = 5 * 6
        assert len(x) == n
        torch.testing.assert_close(moments.inputs, (x.T @ x / n).float())
        torch.testing.assert_close(moments.inner, (g1.square().sum(dim=0) / n).float())
        torch.testing.assert_close(moments.outputs, (g2.T @ g2 / n).float())


def exact_fisher(model, layer, token):
    """Fisher matrix of W2 and probabilities after one token, over all labels: x, G, p."""
    projection = model.ffn[layer].value
    seen = {}
    handle = projection.module.register_forward_hook(
        lambda _module, inputs, output: seen.update(x=inputs[0][0, 0].detach(), y=output)
    )
    embedded = model.model.get_input_embeddings()(torch.tensor([[token]])).requires_grad_()
    log_p = model.model(inputs_embeds=embedded).logits[0, 0].log_softmax(dim=-1)
    handle.remove()
    rows = [torch.autograd.grad(v, seen["y"], retain_graph=True)[0][0, 0] for v in log_p]
    gradients, p = torch.stack(rows), log_p.detach().exp()
    return seen["x"], (p[:, None] * gradients).T @ gradients, log_p.detach()


def test_where_there_is_one_position_sampled_labels_give_the_exact_fisher_matrix(
    make_model, monkeypatch
):
    monkeypatch.setattr(neutral, "METRIC_ROWS", 5_000)
    model = make_model("llama")
    text = sample(model, 20_000, 2, seed=0)  # every text: the first token, and one label
    moments = measure(model, text, [2])[2]
    _, fisher, _ = exact_fisher(model, 2, int(text[0, 0]))
    error = (moments.outputs - fisher).norm() / fisher.norm()
    assert error < 0.05  # of sampling: 1 / sqrt(20,000), times a few


def test_the_predicted_kl_is_right_to_second_order(make_model):
    model = make_model("llama")
    token, layer = 0, 2
    x, fisher, log_p = exact_fisher(model, layer, token)
    weight = model.parameter(model.ffn[layer].value.weight_name)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for size in (1e-2, 1e-3):
        predicted = (change @ x) @ fisher @ (change @ x) * size**2 / 2
        with torch.no_grad():
            weight += size * change
            edited = model.model(input_ids=torch.tensor([[token]])).logits[0, 0].log_softmax(-1)
            weight -= size * change
        measured = (log_p.exp() * (log_p - edited)).sum()
        errors.append(float((predicted - measured).abs()))
    assert errors[1] < errors[0] / 500  # the third power of a tenth


def test_a_file_holds_the_layers_asked_for(make_model, monkeypatch, tmp_path):
    monkeypatch.setattr(neutral, "METRIC_LAYERS", 2)
    monkeypatch.setattr(neutral, "METRIC_LENGTH", 16)
    model = make_model("llama")
    write_metric(tmp_path / "m", model, NeutralMetric((2, 0, 1), 100))
    text = sample(model, 7, 16, seed=0)  # seven texts of fifteen tokens with a label each
    for layer, wanted in measure(model, text, [0, 1, 2]).items():
        for one, other in zip(read_metric(tmp_path / "m", layer), wanted, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(EditError, match=r"layers \[1, 3\], not all .* 0 to 2"):
        write_metric(tmp_path / "n", model, NeutralMetric((1, 3), 100))
