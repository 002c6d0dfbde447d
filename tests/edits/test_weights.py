"""Weight deltas against dense arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kmebench.edits.edit import Edit
from kmebench.edits.weights import Columns, Dense, LowRank, Rows, WeightDelta
from kmebench.errors import KMEBenchError

SHAPE = torch.Size((5, 7))


def draw_part(kind: str, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "rows":
        return Rows.summed(torch.randint(5, (4,), generator=generator), normal(4, 7))
    if kind == "columns":
        return Columns.summed(torch.randint(7, (6,), generator=generator), normal(6, 5))
    if kind == "lowrank":
        return LowRank(normal(5, 2), normal(2, 7))
    return Dense(normal(5, 7))


kinds = st.sampled_from(["rows", "columns", "lowrank", "dense"])


@settings(max_examples=60, deadline=None)
@given(kinds, kinds, st.integers(0, 99))
def test_sum_of_deltas_is_sum_of_dense_matrices(first, second, seed):
    a, b = draw_part(first, seed), draw_part(second, seed + 1)
    total = (WeightDelta({"w": a}) + WeightDelta({"w": b}))["w"]
    torch.testing.assert_close(total.dense(SHAPE), a.dense(SHAPE) + b.dense(SHAPE))


@settings(max_examples=40, deadline=None)
@given(kinds, st.integers(0, 99))
def test_norm_is_the_frobenius_norm_of_the_dense_matrix(kind, seed):
    part = draw_part(kind, seed)
    assert part.norm() == pytest.approx(float(torch.linalg.norm(part.dense(SHAPE))), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(kinds, st.integers(0, 99))
def test_spectral_norm_is_the_largest_singular_value(kind, seed):
    part = draw_part(kind, seed)
    largest = float(torch.linalg.svdvals(part.dense(SHAPE))[0])
    assert WeightDelta({"w": part}).spectral_norms()["w"] == pytest.approx(largest, rel=1e-9)


def test_spectral_norms_of_vectors_of_nothing_and_of_what_overflows():
    delta = WeightDelta(
        {
            "bias": Dense(torch.tensor([3.0, 4.0])),
            "none": Rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 7)),
            "huge": Dense(torch.full((2, 2), 1e200, dtype=torch.float64)),
        }
    )
    assert delta.spectral_norms() == {"bias": 5.0, "none": 0.0, "huge": torch.inf}


def test_repeated_segments_add_up():
    part = Rows.summed(torch.tensor([3, 1, 3]), torch.tensor([[1.0], [2.0], [4.0]]))
    assert part.index.tolist() == [1, 3]
    assert part.values.tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize("kind", ["rows", "columns", "lowrank", "dense"])
def test_saved_delta_reads_back_bit_by_bit(kind, tmp_path):
    part = draw_part(kind, 0)
    Edit(WeightDelta({"model.layer.w": part})).save(tmp_path / "delta.safetensors")
    loaded = Edit.load(tmp_path / "delta.safetensors").weights["model.layer.w"]
    assert type(loaded) is type(part)
    for saved, read in zip(part.factors(), loaded.factors(), strict=True):
        assert torch.equal(saved, read)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(KMEBenchError, match=r"x\.safetensors is not an edit"):
        Edit.load(tmp_path / "x.safetensors")


def test_nan_is_found():
    assert not WeightDelta({"w": Dense(torch.tensor([1.0, float("nan")]))}).is_finite()


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "delta.safetensors"
    Edit(WeightDelta({"w": Dense(torch.ones(3, 3))})).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(KMEBenchError, match=r"delta\.safetensors cannot be read as an edit"):
        Edit.load(path)


@pytest.mark.parametrize("kind", ["rows", "columns", "lowrank", "dense"])
def test_a_part_fits_its_own_parameter_and_no_other(kind):
    part = draw_part(kind, 0)
    assert part.fits(SHAPE)
    for other in ((7, 5), (3, 3), (5,), (35,), (5, 7, 1), ()):
        assert not part.fits(torch.Size(other))


def test_entries_of_a_vector_fit_it():
    assert Rows(torch.tensor([0, 4]), torch.ones(2)).fits(torch.Size([5]))
    assert not Rows(torch.tensor([0, 5]), torch.ones(2)).fits(torch.Size([5]))
    assert not Rows(torch.tensor([-1]), torch.ones(1)).fits(torch.Size([5]))
    assert not Rows(torch.tensor([0.0]), torch.ones(1)).fits(torch.Size([5]))


@pytest.mark.parametrize("name", ["w", "w|Rows", "w|Rows|values", "w|Squares|values"])
def test_a_delta_with_other_tensors_is_damaged(name, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_file({name: torch.zeros(1)}, path, metadata={"format": "kmebench.delta.v1"})
    with pytest.raises(KMEBenchError, match=r"delta\.safetensors is a damaged edit"):
        Edit.load(path)


def test_a_missing_delta_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(KMEBenchError, match="cannot be read as an edit"):
            Edit.load(path)
