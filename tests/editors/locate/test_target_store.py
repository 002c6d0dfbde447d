"""Targets as a cached stage."""

import pytest
import torch

from kmebench.editors import contexts
from kmebench.editors.base import build_editor
from kmebench.editors.locate import target_store
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.target_store import cache_targets, stored_targets
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.errors import EditError, KMEBenchError, ModelError
from kmebench.evaluation.predict import Settings
from kmebench.io.parts import Parts
from kmebench.memory import NoMemoryError
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches
from tests.conftest import without_word

SETTINGS = TargetSettings(
    site="layer",
    layer=1,
    steps=3,
    learning_rate=0.2,
    kl_factor=0.0625,
    weight_decay=1e-3,
    clamp_factor=1.0,
)


@pytest.fixture
def targets(make_model, requests, tmp_path):
    cache_targets(Parts(tmp_path / "targets", {}), make_model("llama"), requests, SETTINGS)
    return tmp_path / "targets"


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit", "betaedit", "rect", "prune"])
def test_editors_write_the_same_with_cached_targets(
    name, targets, make_model, requests, tmp_path, monkeypatch
):
    torch.manual_seed(1)
    keys = torch.randn(60, 24)
    write_covariance(tmp_path / "covariance", {1: keys.T @ keys / 60}, 60, {"source": "self"})
    hparams = {"layers": (1,), "steps": 3, "learning_rate": 0.2, "clamp_factor": 1.0}
    hparams |= {"threshold": 0.8} if name in ("alphaedit", "betaedit") else {}
    model = make_model("llama")
    assets = {"covariance": tmp_path / "covariance"}
    fresh = build_editor(name, hparams, assets)
    cached = build_editor(name, hparams, assets | {"targets": targets})
    some = [requests[2], requests[0]]
    (expected,) = fresh.edit(model, some).values()
    with monkeypatch.context() as patch:
        patch.delattr(
            "kmebench.editors.locate.memit.optimise_targets"
        )  # nothing is optimised again
        (found,) = cached.edit(model, some).values()
    shape = model.ffn[1].value.weight.shape
    torch.testing.assert_close(found.dense(shape), expected.dense(shape), rtol=1e-9, atol=1e-12)
    assert cached.steps == fresh.steps
    assert cached.stopwatch.seconds["optimise"] > 0


def test_targets_that_were_interrupted_go_on(targets, make_model, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(target_store, "_REQUESTS_AT_ONCE", 2)
    asked, parts = [], Parts(tmp_path / "parts", {})

    def cut(model, some, *rest):
        asked.append([r.case_id for r in some])
        if len(asked) == 2:
            raise RuntimeError("power cut")
        return optimise_targets(model, some, *rest)

    monkeypatch.setattr(target_store, "optimise_targets", cut)
    with pytest.raises(RuntimeError):
        cache_targets(parts, make_model("llama"), requests, SETTINGS)
    cache_targets(parts, make_model("llama"), requests, SETTINGS)
    assert asked == [["a", "b"], ["c"], ["c"]]
    expected, found = (stored_targets(path, ["c", "a"]) for path in (targets, parts.path))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.steps, expected.steps)
    assert not (tmp_path / "parts.partial").exists()


def test_the_time_of_a_batch_is_its_share_of_all(targets):
    one, three = stored_targets(targets, ["b"]), stored_targets(targets, ["a", "c", "b"])
    assert three.seconds == pytest.approx(3 * one.seconds)
    assert torch.equal(three.values[2], one.values[0])


def test_out_of_memory_half_as_many_are_optimised_at_once(
    make_model, requests, tmp_path, monkeypatch
):
    whole = target_store.optimise_targets
    tried = []

    def limited(model, requests, contexts, settings, editor):
        tried.append(settings.micro_batch)
        if settings.micro_batch > 10:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return whole(model, requests, contexts, settings, editor)

    monkeypatch.setattr(target_store, "optimise_targets", limited)
    cache_targets(Parts(tmp_path / "targets", {}), make_model("gptj"), requests, SETTINGS)
    assert tried == [20, 10]
    assert stored_targets(tmp_path / "targets", ["a"]).values.isfinite().all()


@pytest.fixture
def no_japan(make_model, monkeypatch):
    """A model that makes NaN of a word that request b alone holds; contexts are without it."""
    for module in (target_store, contexts):
        monkeypatch.setattr(module, "sample_contexts", lambda *_, **__: (("{}",), ("Rome. {}",)))
    return without_word(make_model("gptj"), " Japan")


@pytest.mark.parametrize("at_once", [1, 2, 100])  # 1: a part that holds no target
def test_a_target_that_is_not_finite_fails_alone_and_when_it_is_read(
    at_once, no_japan, requests, tmp_path, monkeypatch
):
    monkeypatch.setattr(target_store, "_REQUESTS_AT_ONCE", at_once)
    others_are_what_they_are(no_japan, requests, tmp_path)
    with pytest.raises(EditError, match=r"^targets: the target of request 'b' at layer 1 became"):
        stored_targets(tmp_path / "all", ["a", "b"])


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_so_does_a_request_that_the_model_cannot_be_given(
    at_once, make_model, requests, tmp_path, monkeypatch
):
    monkeypatch.setattr(target_store, "_REQUESTS_AT_ONCE", at_once)
    model = make_model("gptj")
    encode = model.encode_subjects

    def encode_subjects(texts):
        if any(text.subject == "Japan" for text in texts):
            raise ModelError("No token holds the end of the subject 'Japan'.")
        return encode(texts)

    monkeypatch.setattr(model, "encode_subjects", encode_subjects)
    others_are_what_they_are(model, requests, tmp_path)
    with pytest.raises(EditError, match=r"^Cannot edit request 'b': No token holds"):
        stored_targets(tmp_path / "all", ["b"])


def others_are_what_they_are(model, requests, folder):
    for name, some in (("all", requests), ("others", [requests[0], requests[2]])):
        cache_targets(Parts(folder / name, {}), model, some, SETTINGS)
    found, expected = (stored_targets(folder / name, ["c", "a"]) for name in ("all", "others"))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.steps, expected.steps)


@pytest.mark.parametrize("skip", [True, False])
def test_a_batch_with_such_a_request_is_skipped_or_ends_the_run(skip, no_japan, requests, tmp_path):
    cache_targets(Parts(tmp_path / "targets", {}), no_japan, requests, SETTINGS)
    write_covariance(tmp_path / "covariance", {1: torch.eye(24)}, 60, {"source": "self"})
    assets = {name: tmp_path / name for name in ("covariance", "targets")}
    editor = build_editor("memit", {"layers": (1,), "steps": 3}, assets)
    setup = Setup(no_japan, editor, Settings(8, 1), Checkpoints(tmp_path / "k", 1, {}), skip)
    if skip:
        assert [f["case_ids"] for f in run_batches(setup, requests, 1).failed] == [["b"]]
    else:
        with pytest.raises(EditError, match=r"target of request 'b' .* lower learning_rate"):
            run_batches(setup, requests, 1)


def test_out_of_memory_names_what_reaches_the_stage(make_model, requests, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(target_store, "optimise_targets", full)
    with pytest.raises(NoMemoryError, match=r"10 at once \(.*\): choose a smaller dtype\.$"):
        cache_targets(Parts(tmp_path / "t", {}), make_model("gptj"), requests, SETTINGS)


def test_requests_that_are_not_there_and_other_files_are_refused(targets, tmp_path):
    with pytest.raises(KMEBenchError, match=r"targets holds no target for request 'x'.*delete it"):
        stored_targets(targets, ["a", "x"])
    write_covariance(tmp_path / "other", {0: torch.eye(2)}, 1, {})
    with pytest.raises(KMEBenchError, match=r"other is not a file of format kmebench.targets.v3"):
        stored_targets(tmp_path / "other", ["a"])


def test_the_file_can_be_read_by_others_like_any_result(targets):
    assert targets.stat().st_mode & 0o044 == 0o044
