"""Segments trained in place, against deltas and against dense autograd."""

import pytest
import torch

from kmebench.editors.pac import segments as segments_module
from kmebench.editors.pac.gradients import observed
from kmebench.editors.pac.segments import TrainedSegments
from kmebench.edits.weights import Rows, WeightDelta
from tests.conftest import FAMILIES
from tests.edits.test_ledger import NoCopies


def choices(model, n_rows, n_segments, seed):
    """Random segments [R, L, 2, N]."""
    torch.manual_seed(seed)
    shape = (n_rows, model.n_layers, 2, model.ffn_width)
    return torch.rand(shape).argsort(dim=-1)[..., :n_segments]


def logits_of(model, ids):
    return model.model(input_ids=ids).logits


def randomise(segments):
    torch.manual_seed(3)
    for parameter in segments.parameters():
        parameter.normal_(std=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_the_model_is_the_edited_model_and_then_itself_again(family, make_model):
    model = make_model(family)
    ids = torch.randint(0, 50, (2, 7))
    untouched = logits_of(model, ids)
    segments = TrainedSegments(model, [choices(model, 2, 4, 0), choices(model, 2, 2, 1)])
    randomise(segments)
    with segments.in_place():
        inside = logits_of(model, ids)
    assert torch.equal(untouched, logits_of(model, ids))
    assert not torch.allclose(inside, untouched)
    model.apply(segments.delta())
    torch.testing.assert_close(inside, logits_of(model, ids), rtol=1e-10, atol=1e-10)


def test_bits_come_back_after_a_failure(make_model):
    model = make_model("gptj", torch.bfloat16)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    segments = TrainedSegments(model, [choices(model, 2, 4, 0)])
    randomise(segments)

    def fail_inside():
        with segments.in_place():
            name = model.ffn[0].key.weight_name
            assert not torch.equal(model.parameter(name), before[name])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_dense_autograd(family, spread, make_model, monkeypatch):
    """Two requests, two kinds of loss: all rows' gradients, on the segments of either request."""
    if spread:  # as if every parameter were on a device of its own
        monkeypatch.setattr(segments_module, "group_key", id)
    model = make_model(family)
    ids = torch.randint(0, 50, (2, 7))
    kinds = [choices(model, 2, 4, 0), choices(model, 2, 3, 1)]
    kinds[0][0, :, :, 3] = kinds[0][0, :, :, 0]  # named twice
    kinds[0][1, :, :, 0] = kinds[0][0, :, :, 1]  # shared
    kinds[1][0, :, :, 0] = kinds[0][0, :, :, 1]  # of both kinds
    segments = TrainedSegments(model, kinds)
    for number in range(2):
        for rows in ([1], [0]):  # gradients add up

            def receive(layer, matrix, residual, inner, number=number):
                segments.add_gradient(number, layer, matrix, residual, inner)

            with observed(model, receive, range(model.n_layers)):
                logits = model.model(input_ids=ids[rows]).logits
                (logits.square().mean(dim=(1, 2)).sum() * (number + 1)).backward()
    dense = _dense_gradients(model, ids)
    expected = {
        name: [dense[name].movedim(axis, 0)[offset + kind.unique()] for kind in chosen]
        for name, axis, offset, chosen in _trained(model, kinds)
    }
    groups = [list(expected)]
    if spread:
        groups = [[name] for name in expected]
    elif model.ffn[0].key.bias_name:
        groups = [[n for n in expected if dense[n].dim() == dim] for dim in (2, 1)]
    changes = iter(segments.parameters())
    for names in groups:
        for number in range(2):
            gradient = torch.cat([expected[name][number] for name in names]) * (number + 1)
            torch.testing.assert_close(next(changes).grad, gradient, rtol=1e-9, atol=1e-12)
    assert next(changes, None) is None


def _trained(model, kinds):
    """(name, axis, offset, segments [R, N] of each kind) of every trained parameter."""
    for layer, matrix, projection in _projections(model):
        chosen = [kind[:, layer, matrix] for kind in kinds]
        yield projection.weight_name, projection.axis, projection.offset, chosen
        if matrix == 0 and projection.bias_name:
            yield projection.bias_name, 0, projection.offset, chosen


def _projections(model):
    return [
        (layer, matrix, projection)
        for layer, ffn in enumerate(model.ffn)
        for matrix, projection in enumerate((ffn.key, ffn.value))
    ]


def _dense_gradients(model, ids):
    names = [p.weight_name for *_, p in _projections(model)]
    names += [p.bias_name for _, matrix, p in _projections(model) if matrix == 0 and p.bias_name]
    leaves = [model.parameter(name).requires_grad_() for name in names]
    loss = logits_of(model, ids).square().mean(dim=(1, 2)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    model.model.requires_grad_(False)
    return dict(zip(names, gradients, strict=True))


def test_requests_share_a_segment_that_both_chose(make_model):
    model = make_model("llama")
    segments = TrainedSegments(model, [choices(model, 1, 4, 0).expand(2, -1, -1, -1)])
    (change,) = segments.parameters()
    assert len(change) == 4 * model.n_layers * 2


def test_a_segment_of_both_kinds_starts_from_the_masters_and_adds_up(make_model):
    """bfloat16 weights with a pending residual: nothing optimised changes nothing."""
    model = make_model("llama", torch.bfloat16)
    name = model.ffn[0].key.weight_name
    update = torch.full((1, 16), 1e-3)
    model.apply(WeightDelta({name: Rows(torch.tensor([2]), update)}))
    assert model.edits.residual(name, 0, torch.tensor([2])).abs().max() > 0
    live, master = model.parameter(name).clone(), model.edits.master(name)
    paths = torch.full((1, model.n_layers, 2, 1), 2)
    segments = TrainedSegments(model, [paths, paths])
    with segments.in_place():
        assert torch.equal(live, model.parameter(name))
    assert all(norm == 0 for norm in segments.delta().norms().values())
    for change in segments.parameters():
        change.fill_(0.25)
    model.apply(segments.delta())
    torch.testing.assert_close(model.edits.master(name)[2], master[2] + 0.5)


def test_live_weights_are_never_written_through_a_transposed_view(make_model):
    model = make_model("llama", torch.bfloat16)
    segments = TrainedSegments(model, [choices(model, 2, 4, 0)])
    with NoCopies() as mode, segments.in_place():
        segments.write()
    assert mode.written >= 3 * 2 * model.n_layers
