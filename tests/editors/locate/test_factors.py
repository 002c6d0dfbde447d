"""What editors read of C: against torch.linalg in float64, and the reference's own projector."""

import re

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.locate.alphaedit import count_free
from kmebench.editors.locate.covariance.factors import (
    _place,
    cache_factor,
    inverse_of,
    read_inverse,
    read_spectrum,
    spectrum_of,
)
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.needs import Inverse, Spectrum
from kmebench.errors import EditError, KMEBenchError

M, LAYERS = 24, (0, 1)


@pytest.fixture
def covariance(tmp_path):
    """C of two layers, ill-conditioned: their keys differ in scale by a factor of a thousand."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -3, M)
    made = {layer: (x.T @ x / 60).float() for layer in LAYERS for x in [torch.randn(60, M) * scale]}
    write_covariance(tmp_path / "c.safetensors", made, 60, {"source": "self"})
    return tmp_path / "c.safetensors", made


def test_the_inverse_solves_as_exactly_as_a_solver(covariance):
    c = covariance[1][0]
    keys = torch.randn(M, 3, dtype=torch.float64)
    solved = inverse_of(c) @ keys
    torch.testing.assert_close(solved, torch.linalg.solve(c.double(), keys), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("threshold", [1e-5, 1e-3, 2e-2])
def test_the_null_space_is_the_references(covariance, threshold):
    """AlphaEdit's code projects on left singular vectors with small singular values."""
    c = covariance[1][1].double()
    left, singular, _ = torch.linalg.svd(c)
    theirs = left[:, singular < threshold] @ left[:, singular < threshold].T
    spectrum = spectrum_of(c)
    unused = int((spectrum.values < threshold).sum())
    assert 0 < unused < M
    ours = spectrum.vectors[:unused].T @ spectrum.vectors[:unused]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (9, "alphaedit: layer 3: 9 of 1000 directions free.* next to nothing is changed; raise"),
        (10, None),
        (999, None),
        (1000, "1000 of 1000 directions free, .* 0.25 to 0.25, are below 2: .* protected; lower"),
    ],
)
def test_alphaedit_says_where_its_threshold_separates_nothing(free, told, caplog):
    values = torch.full((1000,), 4.0)
    values[:free] = 0.25
    with caplog.at_level("INFO", "kmebench"):
        assert count_free(values, 2.0, "alphaedit: layer 3") == free
    (record,) = caplog.records
    assert (record.levelname == "WARNING") == (told is not None)
    assert re.search(told or f": {free} of 1000 directions free$", record.getMessage())


def test_alphaedit_refuses_to_edit_nothing():
    with pytest.raises(
        EditError, match=r"none of .*, 0.25 to 4, is below 0.02, .* raise threshold"
    ):
        count_free(torch.tensor([0.25, 4.0]), 0.02, "alphaedit: layer 3")


def test_a_singular_covariance_is_named_with_its_smallest_eigenvalue():
    keys = torch.randn(M, 3, dtype=torch.float64)
    with pytest.raises(EditError, match=r"smallest eigenvalue .* raise covariance.tokens"):
        inverse_of(keys @ keys.T)


def test_a_file_holds_what_was_computed_of_its_layer(covariance, tmp_path):
    file, made = covariance
    cache_factor(tmp_path / "i", file, "inverse", 1)
    cache_factor(tmp_path / "s", file, "spectrum", 1)
    assert torch.equal(read_inverse(tmp_path / "i"), inverse_of(made[1]))
    for read, computed in zip(read_spectrum(tmp_path / "s"), spectrum_of(made[1]), strict=True):
        assert torch.equal(read, computed)
    with pytest.raises(EditError, match=r"holds no covariance of layer 7, only of 0, 1"):
        cache_factor(tmp_path / "i", file, "inverse", 7)
    with pytest.raises(KMEBenchError, match=r"c\.safetensors"):
        read_inverse(file)


@pytest.mark.parametrize(
    ("name", "need", "where"),
    [
        ("rome", Inverse, {"layer": 1}),
        ("memit", Inverse, {"layers": LAYERS}),
        ("emmet", Inverse, {"layers": LAYERS}),
        ("alphaedit", Spectrum, {"layers": LAYERS}),
    ],
)
def test_cached_factors_give_the_same_bits_as_the_covariance(
    name, need, where, covariance, make_model, requests, tmp_path
):
    file, _ = covariance
    model, hparams = make_model("llama"), {"steps": 2, **where}
    files = {need(layer).key: tmp_path / need(layer).key for layer in LAYERS}
    for layer in LAYERS:
        cache_factor(files[need(layer).key], file, need.asset, layer)
    cached, computed = (
        build_editor(name, hparams, assets).edit(model, requests)
        for assets in (files, {"covariance": file})
    )
    assert cached.keys() == computed.keys()
    for part, other in zip(cached.values(), computed.values(), strict=True):
        assert all(map(torch.equal, part.factors(), other.factors()))


@pytest.mark.parametrize(
    ("device", "there", "place"),
    [
        ("cuda:1", True, "cuda:1"),
        ("auto", True, "cuda"),
        ("balanced", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("mps", False, "cpu"),
    ],
)
def test_factors_are_computed_on_the_gpu_of_the_model(device, there, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert _place(device) == place
