"""Offsets inside the forward pass against weights changed in place, and against autograd."""

import pytest
import torch

from kmebench.editors.segments import SegmentOffsets
from kmebench.weights.delta import Rows, WeightDelta
from tests.conftest import FAMILIES


def choices(model, n_rows, n_segments, seed):
    torch.manual_seed(seed)
    width = model.ffn_width
    return [
        torch.stack(
            [torch.randperm(width)[:n_segments] for _ in range(2 * model.n_layers)]
        ).reshape(model.n_layers, 2, n_segments)
        for _ in range(n_rows)
    ]


def logits_of(model, ids):
    return model.model(input_ids=ids).logits


def randomise(offsets):
    torch.manual_seed(3)
    for parameter in offsets.parameters():
        parameter.data.normal_(std=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_with_offsets_equals_forward_of_the_edited_model(family, make_model):
    model = make_model(family)
    ids = torch.randint(0, 50, (2, 7))
    offsets = SegmentOffsets(model, [choices(model, 2, 4, 0), choices(model, 2, 2, 1)])
    randomise(offsets)
    with offsets.added(torch.arange(2)):
        inside = logits_of(model, ids)
    untouched = logits_of(model, ids)
    model.apply(offsets.delta())
    torch.testing.assert_close(inside, logits_of(model, ids), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(inside, untouched)
    model.revert()
    assert torch.equal(untouched, logits_of(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rows_loss_moves_its_own_segments_and_no_others(family, make_model):
    """Two rows, two groups: gradients equal those of dense autograd, row by row, masked."""
    model = make_model(family)
    ids = torch.randint(0, 50, (2, 7))
    groups = [choices(model, 1, 4, 0), choices(model, 1, 3, 1)]
    offsets = SegmentOffsets(model, groups)
    with torch.enable_grad(), offsets.added(torch.arange(2)):
        loss = logits_of(model, ids).square().mean(dim=(1, 2)).sum()
        loss.backward()
    step = WeightDelta(_gradients(offsets))
    for row, group in enumerate(groups):
        for name, dense in _dense_gradients(model, ids[row : row + 1]).items():
            layer, matrix, projection, is_bias = _place(model, name)
            if layer is None:
                continue
            chosen = group[0][layer, matrix]
            axis = 0 if is_bias else projection.axis
            got = step[(row, name)].dense(dense.shape)
            expected = torch.zeros_like(dense)
            expected.movedim(axis, 0)[chosen] = dense.movedim(axis, 0)[chosen]
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def _gradients(offsets):
    """Gradients of the offsets as parts, keyed by (group, parameter name)."""
    parts = {}
    for block in offsets._blocks:
        group_of = block.owners.bool().int().argmax(dim=0)
        for row in (0, 1):
            mine = group_of == row
            kind = next(iter(block.parts()))[1].__class__
            parts[row, block.projection.weight_name] = kind.summed(
                block.index[mine], block.offset.grad[mine]
            )
            if block.bias_offset is not None:
                parts[row, block.projection.bias_name] = Rows.summed(
                    block.index[mine], block.bias_offset.grad[mine]
                )
    return parts


def _dense_gradients(model, ids):
    named = {n: p for n, p in model.model.named_parameters() if _place(model, n)[0] is not None}
    for parameter in named.values():
        parameter.requires_grad_(True)
    loss = logits_of(model, ids).square().mean(dim=(1, 2)).sum()
    gradients = torch.autograd.grad(loss, list(named.values()))
    for parameter in named.values():
        parameter.requires_grad_(False)
    return dict(zip(named, gradients, strict=True))


def _place(model, name):
    for layer, ffn in enumerate(model.ffn):
        for matrix, projection in enumerate((ffn.key, ffn.value)):
            if name == projection.weight_name:
                return layer, matrix, projection, False
            if name == projection.bias_name and matrix == 0:
                return layer, matrix, projection, True
    return None, None, None, None


def test_rows_of_a_batch_share_a_segment_that_both_chose(make_model):
    model = make_model("llama")
    same = choices(model, 1, 4, 0) * 2
    offsets = SegmentOffsets(model, [same])
    assert all(block.offset.shape[0] == 4 for block in offsets._blocks)


def test_a_segment_in_both_groups_starts_from_the_masters_once(make_model):
    """bfloat16 weights with pending residuals: offsets add the residual exactly once."""
    model = make_model("llama", torch.bfloat16)
    name = model.ffn[0].key.weight_name
    update = torch.full((1, 16), 1e-3)
    model.apply(WeightDelta({name: Rows(torch.tensor([2]), update)}))
    residual = model.edits.residual(name, 0, torch.tensor([2]))
    assert residual.abs().max() > 0
    paths = torch.full((model.n_layers, 2, 1), 2)
    offsets = SegmentOffsets(model, [[paths], [paths]])
    block = offsets._blocks[0]
    torch.testing.assert_close(block.offset.detach().sum(dim=0, keepdim=True), residual)
    # Nothing was optimised, so nothing changed.
    assert all(norm == 0 for norm in offsets.delta().norms().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_of_other_rows_stand_still(family, make_model):
    model = make_model(family)
    groups = [choices(model, 2, 4, 0), choices(model, 2, 2, 1)]
    offsets = SegmentOffsets(model, groups)
    with offsets.moving(torch.tensor([1, 3])):  # the second row of both groups
        randomise(offsets)
    moved = offsets.delta()
    for layer, ffn in enumerate(model.ffn):
        for matrix, projection in enumerate((ffn.key, ffn.value)):
            part = moved[projection.weight_name]
            touched = part.index[part.values.abs().sum(1) > 0]
            own = torch.cat([group[1][layer, matrix] for group in groups])
            assert set(touched.tolist()) == set(own.tolist())
