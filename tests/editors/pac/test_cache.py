"""The gradient cache and the path files."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kmebench.editors.needs import Paths
from kmebench.editors.pac.cache import (
    GradientCache,
    PathFile,
    cache_gradients,
    select_groups,
    write_gradients,
    write_paths,
)
from kmebench.editors.pac.impact import Impact, trace
from kmebench.editors.pac.paths import select_paths
from kmebench.errors import KMEBenchError
from kmebench.io.checked_files import DamagedFileError
from kmebench.io.parts import Parts

NEED = Paths("l2", group=1, selection="disjoint", paths=3, negatives=1)


@pytest.fixture
def cache(make_model, requests, tmp_path):
    model = make_model("gptj")
    cache_gradients(Parts(tmp_path / "gradients.safetensors", {}), model, requests)
    return model, GradientCache.open(tmp_path / "gradients.safetensors")


def test_cache_is_a_safetensors_file_of_the_traced_scores(cache, requests):
    model, opened = cache
    tensors = load_file(opened.path)
    assert opened.case_ids == tuple(r.case_id for r in requests)
    for row, request in enumerate(requests):
        impact = trace(model, [request])
        assert torch.equal(tensors["l2"][row], impact.l2[0])
        assert torch.equal(tensors["signed_sum"][row], impact.signed_sum[0])
        answer = tensors["answers"][row]
        assert tuple(answer[answer >= 0].tolist()) == impact.answers[0]
    assert (tensors["seconds"] > 0).all()


@pytest.mark.parametrize("score", ["l2", "signed_sum"])
@pytest.mark.parametrize("group", [1, 2])
def test_route_of_a_request_is_the_selection_from_its_groups_scores(
    cache, requests, tmp_path, score, group
):
    _, opened = cache
    need = replace(NEED, score=score, group=group)
    write_paths(tmp_path / "p.safetensors", select_groups(opened, need), opened, need)
    file = PathFile(tmp_path / "p.safetensors")
    scores = load_file(opened.path)[score]
    for row, request in enumerate(requests):
        first = row // group * group
        expected = select_paths(scores[first : first + group].sum(dim=0)[None], 3, 1)
        route = file.route(request.case_id)
        assert torch.equal(route.positive, expected.positive[0])
        assert torch.equal(route.negative, expected.negative[0])


@pytest.mark.parametrize("place", [0.2, 0.6])  # in l2, in signed_sum
def test_a_changed_score_is_found_and_the_cache_set_aside(cache, place):
    _, opened = cache
    content = bytearray(opened.path.read_bytes())
    content[int(len(content) * place)] ^= 1
    opened.path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"the checksum of (l2|signed_sum) of request '.'"):
        [list(opened.group_scores(score, 2)) for score in ("l2", "signed_sum")]
    assert not opened.path.exists()


def test_path_files_are_the_same_bytes_every_time(cache, tmp_path):
    _, opened = cache
    for name in "ab":
        write_paths(tmp_path / name, select_groups(opened, NEED), opened, NEED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unknown_request_is_named(cache, tmp_path):
    _, opened = cache
    write_paths(tmp_path / "p.safetensors", select_groups(opened, NEED), opened, NEED)
    with pytest.raises(KMEBenchError, match=r"p\.safetensors holds no paths for request 'z'"):
        PathFile(tmp_path / "p.safetensors").route("z")


def test_a_cache_that_was_interrupted_goes_on_to_the_same(cache, requests, tmp_path, monkeypatch):
    model, whole = cache
    monkeypatch.setattr("kmebench.editors.pac.cache._REQUESTS_AT_ONCE", 2)
    parts = Parts(tmp_path / "g", {})
    with monkeypatch.context() as patch:
        patch.setattr("kmebench.editors.pac.cache.trace", cut_at(requests[2]))
        with pytest.raises(RuntimeError):
            cache_gradients(parts, model, requests)
    assert not parts.path.exists()
    monkeypatch.setattr("kmebench.editors.pac.cache.trace", only(requests[2]))
    cache_gradients(parts, model, requests)
    expected, found = load_file(whole.path), load_file(parts.path)
    for name in ("l2", "signed_sum", "answers"):
        assert torch.equal(found[name], expected[name])
    assert (found["seconds"] > 0).all()
    assert GradientCache.open(parts.path).case_ids == whole.case_ids
    assert not (tmp_path / "g.partial").exists()


def cut_at(request):
    def fail(model, traced):
        if traced == [request]:
            raise RuntimeError("power cut")
        return trace(model, traced)

    return fail


def only(request):
    def tracing(model, traced):
        assert traced == [request]  # the others are there
        return trace(model, traced)

    return tracing


def test_a_path_file_is_no_cache(cache, tmp_path):
    _, opened = cache
    write_paths(tmp_path / "p.safetensors", select_groups(opened, NEED), opened, NEED)
    with pytest.raises(KMEBenchError, match="is not a file of format"):
        GradientCache.open(tmp_path / "p.safetensors")


def test_rows_come_back_as_they_were_written(tmp_path):
    """Token 0 is a token, and no padding."""
    scores = torch.arange(8.0).reshape(1, 2, 2, 2)
    written = Impact(scores, -scores, [(0, 5)]), 1.5
    write_gradients(tmp_path / "g", ["a"], (2, 2), 3, [written])
    ((impact, seconds),) = GradientCache.open(tmp_path / "g").rows()
    assert torch.equal(impact.l2, scores)
    assert torch.equal(impact.signed_sum, -scores)
    assert (impact.answers, seconds) == ([(0, 5)], 1.5)
