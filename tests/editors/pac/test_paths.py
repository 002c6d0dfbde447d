"""Path selection against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kmebench.editors.pac.paths import select_paths
from kmebench.errors import ConfigError


def path_scores(scores, paths):
    """φ of every path: the sum of its nodes' scores, [G, N]."""
    return scores.gather(-1, paths).sum(dim=(1, 2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_kbest_finds_the_highest_sums_of_the_whole_product_space(seed, n_paths, with_ties):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 2, 2, 13, generator=generator).double()
    if with_ties:
        scores = (scores * 2).round()
    scores = scores[..., : max(n_paths + 1, 4)]
    paths = select_paths(scores, n_paths, 1, "kbest")
    found = path_scores(scores, paths.positive)
    for group, group_scores in enumerate(scores):
        lists = group_scores.reshape(4, -1).tolist()
        sums = sorted((sum(c) for c in itertools.product(*lists)), reverse=True)
        torch.testing.assert_close(found[group], torch.tensor(sums[:n_paths]).double())
        nodes = paths.positive[group].reshape(4, -1).T.tolist()
        assert len({tuple(path) for path in nodes}) == n_paths  # no path twice


def test_disjoint_paths_take_the_nth_ranked_node_everywhere():
    torch.manual_seed(0)
    scores = torch.rand(3, 2, 2, 40)
    paths = select_paths(scores, 5, 2, "disjoint")
    expected = scores.topk(5, dim=-1)
    assert torch.equal(paths.positive, expected.indices)
    assert torch.equal(paths.positive_scores, expected.values)
    assert torch.equal(paths.negative, scores.topk(2, dim=-1, largest=False).indices)


def test_first_kbest_path_is_the_first_disjoint_path():
    torch.manual_seed(1)
    scores = torch.rand(1, 4, 2, 30)
    kbest, disjoint = (select_paths(scores, 6, 1, kind) for kind in ("kbest", "disjoint"))
    assert torch.equal(kbest.positive[..., 0], disjoint.positive[..., 0])
    assert kbest.positive.unique().numel() <= disjoint.positive.unique().numel()


def test_ties_go_to_the_lower_index():
    paths = select_paths(torch.zeros(1, 1, 2, 6), 2, 2, "disjoint")
    assert paths.positive.flatten().tolist() == [0, 1, 0, 1]
    assert paths.negative.flatten().tolist() == [0, 1, 0, 1]


def test_more_paths_than_segments_are_refused():
    with pytest.raises(ConfigError, match=r"paths=6 and negatives=1 .* 6 of one FFN"):
        select_paths(torch.zeros(1, 1, 2, 6), 6, 1)
