"""The ledger: exact revert, masters, whole state."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kmebench.edits.ledger import Ledger
from kmebench.edits.weights import Columns, Dense, LowRank, Rows, WeightDelta


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=False)
        for name, shape in {"w": (6, 4), "v": (4, 6), "b": (6,)}.items()
    }


def some_deltas():
    torch.manual_seed(1)
    return [
        WeightDelta({"w": Rows(torch.tensor([0, 3]), torch.randn(2, 4))}),
        WeightDelta(
            {
                "w": Rows(torch.tensor([3, 5]), torch.randn(2, 4)),
                "v": Columns(torch.tensor([1, 2]), torch.randn(2, 4)),
                "b": Rows(torch.tensor([4]), torch.randn(1)),
            }
        ),
        WeightDelta({"v": Dense(torch.randn(4, 6))}),
        WeightDelta({"w": LowRank(torch.randn(6, 1), torch.randn(1, 4))}),
        WeightDelta({"v": Columns(torch.tensor([5]), torch.randn(1, 4))}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_revert_restores_every_bit(dtype):
    live = parameters(dtype)
    before = {name: p.clone() for name, p in live.items()}
    ledger = Ledger(live)
    for delta in some_deltas():
        ledger.apply(delta)
    assert not torch.equal(live["w"], before["w"])
    ledger.revert()
    assert all(torch.equal(live[name], before[name]) for name in live)
    assert not ledger.total().weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_and_live_weights_are_the_sum_of_all_deltas(dtype):
    live = parameters(dtype)
    before = {name: p.clone() for name, p in live.items()}
    ledger = Ledger(live)
    for delta in some_deltas():
        ledger.apply(delta)
    for name in live:
        parts = [d[name].dense(live[name].shape) for d in some_deltas() if name in d]
        expected = torch.stack([p.to(dtype) for p in parts]).sum(dim=0)
        torch.testing.assert_close(live[name] - before[name], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            ledger.total().weights[name].dense(live[name].shape), expected, atol=1e-5, rtol=0
        )
        assert torch.equal(ledger.original(name), before[name])


def test_a_thousand_tiny_updates_are_not_lost_in_bfloat16():
    live = {"w": nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16), requires_grad=False)}
    ledger = Ledger(live)
    for _ in range(1000):
        ledger.apply(WeightDelta({"w": Rows(torch.tensor([1]), torch.full((1, 3), 1e-3))}))
    assert live["w"][1].tolist() == [2.0] * 3
    assert live["w"][0].tolist() == [1.0] * 3
    residual = ledger.residual("w", 0, torch.tensor([0, 1]))
    torch.testing.assert_close(residual[0], torch.zeros(3))
    torch.testing.assert_close(
        live["w"][1].float() + residual[1], torch.full((3,), 2.0), atol=1e-4, rtol=0
    )


def test_residual_along_the_other_axis_and_of_whole_parameters():
    live = parameters(torch.bfloat16)
    ledger = Ledger(live)
    for delta in some_deltas():
        ledger.apply(delta)
    for name, axis in (("w", 1), ("v", 1), ("v", 0), ("w", 0)):
        index = torch.tensor([0, 1, 3])
        master = ledger.master(name).movedim(axis, 0)[index]
        expected = master - live[name].float().movedim(axis, 0)[index]
        assert torch.equal(ledger.residual(name, axis, index), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_a_fresh_model_bit_by_bit_and_goes_on_the_same(dtype):
    deltas = some_deltas()
    straight = Ledger(live := parameters(dtype))
    for delta in deltas:
        straight.apply(delta)
    first = Ledger(parameters(dtype))
    for delta in deltas[:2]:
        first.apply(delta)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = Ledger(fresh := parameters(dtype))
    resumed.load_state(state)
    for delta in deltas[2:]:
        resumed.apply(delta)
    assert all(torch.equal(fresh[name], live[name]) for name in live)
    for name in live:
        assert torch.equal(resumed.original(name), straight.original(name))


def test_segments_cost_memory_of_what_was_touched():
    live = {"w": nn.Parameter(torch.zeros(10_000, 4), requires_grad=False)}
    ledger = Ledger(live)
    for index in range(8):
        ledger.apply(WeightDelta({"w": Rows(torch.tensor([index]), torch.ones(1, 4))}))
    held = ledger.state()
    assert sum(t.untyped_storage().nbytes() for t in held.values()) < 1_000


class NoCopies(TorchDispatchMode):
    """Refuses what makes a GPU, under deterministic algorithms, copy a weight there and back."""

    written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("aten.index_put", "aten._index_put", "aten.index_copy")):
            assert args[0].is_contiguous(), f"{name} writes into a view of shape {args[0].shape}"
            self.written += 1
        return func(*args, **(kwargs or {}))


def test_segments_are_never_written_through_a_transposed_view():
    ledger = Ledger(parameters(torch.bfloat16))
    with NoCopies() as mode:
        for delta in [*some_deltas()[:2], *some_deltas()]:
            ledger.apply(delta)
        ledger = Ledger(parameters(torch.bfloat16))
        ledger.apply(some_deltas()[1])
        ledger.total()
        for name in ("w", "v", "b"):
            ledger.original(name)
            ledger.master(name)
        ledger.revert()
        some_deltas()[1]["v"].dense((4, 6))
    assert mode.written > 10


def state_of(live, ledger):
    """Bits of the weights, and of masters and originals: all that a ledger knows."""
    masters = {name: ledger.master(name).clone() for name in live}
    originals = {name: ledger.original(name) for name in live}
    bits = {name: p.detach().clone() for name, p in live.items()}
    return [bits, masters, originals, {k: t.clone() for k, t in ledger.state().items()}]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carried", range(5))
def test_a_savepoint_puts_everything_back_bit_by_bit(dtype, carried):
    """With 0 to 4 of the deltas applied before; the block applies all, and reverts in between."""
    live = parameters(dtype)
    ledger = Ledger(live)
    for delta in some_deltas()[:carried]:
        ledger.apply(delta)
    before = state_of(live, ledger)
    with ledger.savepoint():
        for delta in some_deltas():
            ledger.apply(delta)
    assert_same(before, state_of(live, ledger))
    with ledger.savepoint():
        ledger.revert()
        ledger.apply(some_deltas()[2])
    assert_same(before, state_of(live, ledger))
    # And what comes later is what would have come without.
    other = parameters(dtype)
    straight = Ledger(other)
    for delta in some_deltas():
        straight.apply(delta)
    for delta in some_deltas()[carried:]:
        ledger.apply(delta)
    assert_same(state_of(other, straight), state_of(live, ledger))
    ledger.revert()
    assert all(torch.equal(live[name], p) for name, p in parameters(dtype).items())


def test_savepoints_nest_and_hold_when_the_block_fails():
    live = parameters()
    ledger = Ledger(live)
    first, second, third, *_ = some_deltas()
    ledger.apply(first)
    outer = state_of(live, ledger)
    with pytest.raises(KeyError), ledger.savepoint():  # noqa: PT012
        ledger.apply(second)
        inner = state_of(live, ledger)
        with ledger.savepoint():
            ledger.apply(third)
            ledger.apply(first)
        assert_same(inner, state_of(live, ledger))
        ledger.apply(third)
        raise KeyError
    assert_same(outer, state_of(live, ledger))


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_the_total_has_the_models_order_whatever_was_touched_first(order):
    """A run that goes on from a checkpoint has touched all at once."""
    ledger = Ledger({name: nn.Parameter(torch.zeros(2), requires_grad=False) for name in "abc"})
    for name in order:
        ledger.apply(WeightDelta({name: Dense(torch.ones(2))}))
    assert list(ledger.total().weights.norms()) == ["a", "b", "c"]


def test_a_savepoint_copies_what_is_touched_and_no_more():
    live = {name: nn.Parameter(torch.zeros(64, 64), requires_grad=False) for name in "abcd"}
    ledger = Ledger(live)
    for name in live:
        ledger.apply(WeightDelta({name: Dense(torch.ones(64, 64))}))
    with ledger.savepoint():
        ledger.apply(WeightDelta({"a": Dense(torch.ones(64, 64))}))
        assert set(ledger._before) == {"a"}
