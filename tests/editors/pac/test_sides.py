"""What is kept, on the side of a metric that an input meets."""

import pytest
import torch

from kmebench.editors.pac.gradients import KEY, VALUE
from kmebench.editors.pac.sides import MatrixMetric

D, M = 3, 5


@pytest.fixture
def moments():
    """A residual side [D, D], a side of segments [M, M]."""
    generator = torch.Generator().manual_seed(0)
    both = [torch.randn(9, n, dtype=torch.float64, generator=generator) for n in (D, M)]
    return [rows.T @ rows for rows in both]


def rows(width):
    return torch.randn(4, width, generator=torch.Generator().manual_seed(1))


def test_w1_reads_the_residual_stream(moments):
    residual, segments = moments
    metric = MatrixMetric(KEY, torch.linalg.inv(residual), segments.diagonal())
    kept, x = metric.with_inputs(rows(D)), rows(D).double()
    torch.testing.assert_close(kept.residual, torch.linalg.inv(residual + x.T @ x))
    assert kept.segments is metric.segments


@pytest.mark.parametrize("form", ["block", "diagonal", "inverse"])
def test_w2_reads_segments(moments, form):
    residual, segments = moments
    of = {"block": torch.clone, "diagonal": torch.diagonal, "inverse": torch.linalg.inv}[form]
    metric = MatrixMetric(VALUE, torch.linalg.inv(residual), of(segments), form == "inverse")
    kept, k = metric.with_inputs(rows(M)), rows(M).double()
    torch.testing.assert_close(kept.segments, of(segments + k.T @ k))
    assert kept.residual is metric.residual
