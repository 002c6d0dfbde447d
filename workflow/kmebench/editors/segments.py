"""Trainable offsets of chosen FFN segments, added inside the forward pass.

Only the chosen keys (segments of W1) and values (segments of W2) get trainable numbers; the
weights stay frozen and no gradient or optimiser state of a weight's size exists. A mask says
which rows of a batch may move which segment, so that losses of different rows, each with its
own parameters, share one forward and one backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kmebench.models.editable import EditableModel
from kmebench.models.layouts import Projection
from kmebench.tracing.observe import KEY
from kmebench.weights.delta import Columns, Part, Rows, WeightDelta


class _Product(torch.autograd.Function):
    """``x @ offset``, where row r of the batch moves column-owner n only if ``mask[r, n]``.

    Shapes: x [R, T, i]; offset [i, o]; mask [R, n] lies on ``mask_axis`` of offset (0: its
    rows are the segments, 1: its columns are). The gradient of x is not masked.
    """

    @staticmethod
    def forward(ctx, x: Tensor, offset: Tensor, mask: Tensor, mask_axis: int) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.mask_axis = mask_axis
        return x @ offset

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, offset, mask = ctx.saved_tensors
        mask = mask.unsqueeze(1)  # [R, 1, n]
        inner, outer = (x * mask, gradient) if ctx.mask_axis == 0 else (x, gradient * mask)
        offset_gradient = inner.flatten(0, 1).T @ outer.flatten(0, 1)
        return gradient @ offset.T, offset_gradient, None, None


@dataclass
class _Block:
    """The chosen segments of one projection.

    ``index`` [n] may name a segment twice (once as critical for one request, once as
    insignificant for another): the offsets add up. ``owners`` [R, n] is the mask.
    """

    projection: Projection
    is_key: bool
    index: Tensor
    owners: Tensor
    offset: Tensor  # [n, D] trainable
    bias_offset: Tensor | None  # [n] trainable, keys of families with biases
    start: Tensor  # [n, D] value of offset that reproduces the model's masters
    bias_start: Tensor | None

    def forward_hook(self, rows: Tensor):
        """Return a forward hook that adds the offsets' contribution for ``rows`` of the mask."""
        mask = self.owners[rows]

        def add_keys(_module, inputs, output):
            x = inputs[0].to(self.offset.dtype)
            change = _Product.apply(x, self.offset.T, mask, 1)  # [R, T, n]
            if self.bias_offset is not None:
                ones = x.new_ones(*x.shape[:2], 1)
                change = change + _Product.apply(ones, self.bias_offset[None], mask, 1)
            return output.index_add(-1, self.index, change.to(output.dtype))

        def add_values(_module, inputs, output):
            coefficients = inputs[0].index_select(-1, self.index).to(self.offset.dtype)
            change = _Product.apply(coefficients, self.offset, mask, 0)  # [R, T, D]
            return output + change.to(output.dtype)

        return add_keys if self.is_key else add_values

    def held(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the offsets, the segments that none of ``rows`` owns, and their values."""
        index = (self.owners[rows] == 0).all(dim=0).nonzero().squeeze(1)
        for offset in (self.offset, self.bias_offset):
            if offset is not None and len(index):
                yield offset, index, offset.detach()[index]

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yield the changes made so far by parameter name."""
        kind = Rows if self.projection.axis == 0 else Columns
        change = self.offset.detach() - self.start
        yield self.projection.weight_name, kind.summed(self.index, change)
        if self.bias_offset is not None:
            change = self.bias_offset.detach() - self.bias_start
            yield self.projection.bias_name, Rows.summed(self.index, change)


class SegmentOffsets:
    """Offsets of the segments of several sets of paths, one set per row of a batch.

    ``choices`` lists, for each row, its segments [L, 2, N_r] of each of several groups: rows
    of different groups never share an offset, rows of one group share those of segments that
    both chose.
    """

    def __init__(self, model: EditableModel, groups: Sequence[Sequence[Tensor]]) -> None:
        self._blocks: list[_Block] = []
        for layer, ffn in enumerate(model.ffn):
            for matrix, projection in enumerate((ffn.key, ffn.value)):
                chosen = [[rows[layer, matrix] for rows in group] for group in groups]
                self._blocks.append(_block(model, projection, matrix == KEY, chosen))

    def parameters(self) -> list[Tensor]:
        """The trainable tensors."""
        pairs = [(b.offset, b.bias_offset) for b in self._blocks]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @contextmanager
    def added(self, rows: Tensor) -> Iterator[None]:
        """Add the offsets to every forward pass in the block; ``rows`` numbers its batch rows.

        Rows are counted through the groups: those of the first group first.
        """
        handles = [
            block.projection.module.register_forward_hook(block.forward_hook(rows))
            for block in self._blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def moving(self, rows: Tensor) -> Iterator[None]:
        """Leave the segments that none of ``rows`` owns as they are, whatever the block does."""
        held = [tensors for block in self._blocks for tensors in block.held(rows)]
        yield
        for offset, index, values in held:
            offset.detach()[index] = values

    def delta(self) -> WeightDelta:
        """Return what the offsets have become as a delta of the model's weights."""
        return WeightDelta(dict(part for block in self._blocks for part in block.parts()))


def _block(
    model: EditableModel, projection: Projection, is_key: bool, chosen: list[list[Tensor]]
) -> _Block:
    device = projection.weight.device
    n_rows = sum(len(group) for group in chosen)
    indices, masks, first_row = [], [], 0
    for group in chosen:
        index = torch.cat(group).unique()
        mask = torch.zeros(n_rows, len(index))
        for row, segments in enumerate(group, start=first_row):
            mask[row] = torch.isin(index, segments)
        first_row += len(group)
        indices.append(index)
        masks.append(mask)
    index = torch.cat(indices).to(device)
    # A segment named twice must start from the master's residual once, not twice.
    repeated = torch.isin(torch.arange(len(index)), torch.arange(len(indices[0])), invert=True)
    start = model.edits.residual(projection.weight_name, projection.axis, index)
    start[repeated.to(device) & torch.isin(index, indices[0].to(device))] = 0
    bias_start = None
    if is_key and projection.bias_name is not None:
        bias_start = model.edits.residual(projection.bias_name, 0, index)
        bias_start[repeated.to(device) & torch.isin(index, indices[0].to(device))] = 0
    return _Block(
        projection,
        is_key,
        index,
        torch.cat(masks, dim=1).to(device, start.dtype),
        start.clone().requires_grad_(),
        None if bias_start is None else bias_start.clone().requires_grad_(),
        start,
        bias_start,
    )
