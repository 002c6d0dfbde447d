"""What edits leave and what questions cost: bytes and gates worked out by hand."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kmebench.data.records import EditRequest
from kmebench.editors.base import build_editor
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.edits.sentences import SentenceEncoder
from kmebench.evaluation.prompts import prompts_of
from kmebench.pipelines import footprint
from kmebench.pipelines.footprint import bytes_left, gate_shares, question_milliseconds
from kmebench.pipelines.pipelines import Setup, run_batches, run_breadth_first, run_consecutive
from tests.pipelines.runs import SETTINGS, Counting, checkpoints

ROOMY = {"max_position_embeddings": 2048}
D, M = 16, 24


def outcome_of(model, editor, requests, folder, pipeline=run_consecutive, *arguments):
    torch.manual_seed(0)
    setup = Setup(model, editor, SETTINGS, checkpoints(folder))
    return pipeline(setup, requests, *arguments)


# -- gates ------------------------------------------------------------------------------


def query_of(model, prompt):
    """W2's input at a prompt's last token, by one pass over the prompt alone."""
    (ids,) = model.encode_prompts([prompt])
    seen = []
    with (
        model.ffn[1].value.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        torch.no_grad(),
    ):
        model.model(torch.tensor([ids]))
    return seen[0][0, -1]


@pytest.mark.parametrize("radius", [1e-6, 1.0, 4.0, 100.0])
def test_grace_opens_within_its_balls(radius, make_model, requests, tmp_path):
    model = make_model("llama")
    editor = build_editor("grace", {"layer": 1, "radius": radius, "steps": 2}, {})
    outcome = outcome_of(model, editor, requests, tmp_path)
    (book,) = outcome.edit.overlays.values()
    model.revert()
    found = {}
    for prompt in (p for i, r in enumerate(requests) for p in prompts_of(r, i)):
        distances = [float((query_of(model, prompt.prompt) - key).norm()) for key in book.keys]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        opened = distances[nearest] <= float(book.radii[nearest]) + 1e-9
        found.setdefault(prompt.kind, []).append(opened)
    shares = gate_shares(outcome.predictions)
    assert shares == {kind: pytest.approx(sum(x) / len(x)) for kind, x in found.items()}
    assert shares["edit"] == 1.0
    if radius == 1e-6:  # two locality prompts are others' prompts of the edit
        assert shares == {"edit": 1.0, "paraphrase": 0.0, "locality": pytest.approx(2 / 3)}


#: The embeddings of all questions; each edit's prompt has an axis of its own.
VECTORS = {
    "The capital of France is": (1.0, 0.0, 0.0),
    "What language is spoken in Japan?": (0.0, 1.0, 0.0),
    "The capital of Italy is": (0.0, 0.0, 1.0),
    "The Seine flows through": (0.8, 0.6, 0.0),  # 0.8 of the first
    "In Japan, and the language is": (0.6, 0.5, 0.39**0.5),  # 0.62 of the third
    "Paris, and in Italy": (0.7, 0.51**0.5, 0.0),  # 0.714 of the second
    "Mount Fuji stands in": (-1.0, 0.0, 0.0),
}


@pytest.fixture
def embedded(monkeypatch):
    """Texts have the vector of the question that they hold."""

    def embed(_, texts):
        begun = [next(v for key, v in VECTORS.items() if key in t) for t in texts]
        return torch.tensor(begun)

    monkeypatch.setattr(SentenceEncoder, "embed", embed)


@pytest.mark.parametrize(
    ("method", "values", "paraphrases"),
    [
        # Largest cosines of the paraphrases: 0.8, 0.6245, 0.714.
        ("ike", {"demonstrations": 0, "threshold": 0.7}, 2 / 3),
        ("ike", {"demonstrations": 0, "threshold": 0.79}, 1 / 3),
        ("serac", {"threshold": 0.8}, 1.0),  # a cosine of 0.6
        ("serac", {"threshold": 0.95}, 0.0),  # of 0.9
    ],
)
def test_retrieved_facts_open_where_the_cosine_is_large(
    method, values, paraphrases, embedded, make_model, requests, encoder_folder, tmp_path
):
    editor = build_editor(method, values, {"encoder": encoder_folder})
    outcome = outcome_of(make_model("llama", **ROOMY), editor, requests, tmp_path)
    # Locality: two are others' prompts, the third has no fact near it.
    assert gate_shares(outcome.predictions) == {
        "edit": 1.0,
        "paraphrase": pytest.approx(paraphrases),
        "locality": pytest.approx(2 / 3),
    }


def test_an_oracle_opens_for_every_question(make_model, requests, encoder_folder, tmp_path):
    values = {"demonstrations": 0, "scope": "oracle"}
    editor = build_editor("ike", values, {"encoder": encoder_folder})
    model = make_model("llama", **ROOMY)
    predictions = outcome_of(model, editor, requests, tmp_path, run_batches, 2).predictions
    assert gate_shares(predictions) == {"edit": 1.0, "paraphrase": 1.0, "locality": 1.0}


def test_only_the_end_of_a_run_counts():
    rows = [("write", "edit", True), ("final", "edit", False), ("final", "edit", True)]
    rows += [("final", "locality", None)]
    frame = pd.DataFrame(rows, columns=["when", "kind", "gate"])
    assert gate_shares(frame) == {"edit": 0.5}


def test_edits_of_weights_have_no_gate(make_model, requests, tmp_path):
    outcome = outcome_of(make_model("gptj", torch.float32), Counting(), requests, tmp_path)
    assert outcome.predictions["gate"].isna().all()
    assert gate_shares(outcome.predictions) == {}


# -- bytes ------------------------------------------------------------------------------


def test_a_codebook_grows_by_its_entries(make_model, requests, tmp_path):
    """An entry: a key [M], a value [D] and a radius in float64; labels and names as JSON."""
    model = make_model("llama")
    editor = build_editor("grace", {"layer": 1, "radius": 1e-6, "steps": 1}, {})
    outcome = outcome_of(model, editor, requests, tmp_path)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    labels = [list(item.target_ids) for item in encoded]
    expected = []
    for n in (1, 3):
        facts = json.dumps(["model.layers.1.mlp.down_proj", "last", labels[:n]])
        expected.append({"edits_done": n, "change": 8 * n * (M + D + 1) + len(facts), "state": 0})
    assert outcome.bytes == expected


@pytest.mark.parametrize("pipeline", [run_consecutive, run_breadth_first])
def test_a_change_of_weights_has_the_bytes_of_its_file(pipeline, make_model, requests, tmp_path):
    model = make_model("gptj", torch.float32)
    outcome = outcome_of(model, Counting(), requests, tmp_path, pipeline)
    outcome.edit.save(tmp_path / "delta.safetensors")
    tensors = load_file(tmp_path / "delta.safetensors").values()
    saved = sum(len(t.numpy().tobytes()) for t in tensors)
    assert outcome.bytes[-1] == {"edits_done": 3, "change": saved, "state": 4}
    assert saved == 4 * D * M  # all of one matrix, however many edits


def test_segments_count_with_their_numbers(make_model, requests):
    """PAC moves segments [D]: each has D numbers in float32 and one index of eight bytes."""
    model = make_model("gptj", torch.bfloat16)
    editor = build_editor("pac", {"trace_on": "current", "paths": 2, "steps": 1}, {})
    model.apply(editor(model, requests[:1]).edit)
    parts = model.edits.total().weights.values()
    segments = [part.values for part in parts if part.values.dim() == 2]
    entries = [part.values for part in parts if part.values.dim() == 1]  # of biases
    assert all(values.dtype == torch.float32 for values in segments + entries)
    expected = sum((4 * D + 8) * len(x) for x in segments) + sum(12 * len(x) for x in entries)
    assert bytes_left(model, editor) == {"change": expected, "state": 0}


def test_what_an_editor_remembers_grows_apart_from_the_change(make_model, requests, tmp_path):
    """Counting remembers one float32; in batches the first is weighed, before it is undone."""
    model = make_model("gptj", torch.float32)
    outcome = outcome_of(model, Counting(), requests, tmp_path, run_batches, 2)
    assert outcome.bytes == [{"edits_done": 2, "change": 4 * D * M, "state": 4}]
    assert bytes_left(model, Counting()) == {"change": 0, "state": 4}


@pytest.mark.parametrize(
    ("method", "values", "kept"),
    [
        # A key [M] per edit, in the dtype of the model; the size of each call.
        ("alphaedit", {"threshold": 10.0}, lambda edits: (4 * M + 8) * edits),
        # An inverse [M, M] in float64, however many edits.
        ("memit-seq", {}, lambda edits: 8 * M * M),
        ("memit", {}, lambda edits: 0),
    ],
)
def test_the_memory_of_editors_grows_as_their_pages_say(
    method, values, kept, make_model, requests, tmp_path
):
    torch.manual_seed(1)
    x = torch.randn(60, M)
    write_covariance(tmp_path / "covariance", {1: x.T @ x / 60}, 60, {"source": "self"})
    own = {"layers": [1], "steps": 2} | values
    editor = build_editor(method, own, {"covariance": tmp_path / "covariance"})
    model = make_model("gptj", torch.float32)
    outcome = outcome_of(model, editor, requests, tmp_path / "run")
    contexts = len(json.dumps(editor.contexts(model), ensure_ascii=False).encode())
    assert outcome.bytes == [
        {"edits_done": n, "change": 4 * D * M, "state": contexts + kept(n)} for n in (1, 3)
    ]


# -- milliseconds -----------------------------------------------------------------------


@pytest.fixture
def clocked(monkeypatch):
    """A clock that moves by a tenth of a second for each forward pass; and who was asked."""
    clock, asked = [0.0], []

    def predict(model, prompts, settings, *, decode):
        asked.append(([p.case_id for p in prompts], dict(model.edits.overlays), decode))
        busy = 50 if len(asked) in (1, 4) else 1  # another job has the machine for a moment
        clock[0] += 0.1 * busy * (1 + len(model.edits.overlays))
        return {}

    monkeypatch.setattr(footprint, "predict", predict)
    monkeypatch.setattr("kmebench.editors.base.time.perf_counter", lambda: clock[0])
    return asked


@pytest.fixture
def remembering(make_model, requests):
    model = make_model("llama")
    editor = build_editor("grace", {"layer": 1, "steps": 1}, {})
    model.apply(editor(model, requests).edit)
    return model


def test_before_is_the_same_pass_without_overlays_by_turns(remembering, requests, clocked):
    carried = dict(remembering.edits.overlays)
    found = question_milliseconds(remembering, requests[:1], SETTINGS, 1e6)
    assert found == {
        "before": pytest.approx(100 / 3),
        "after": pytest.approx(200 / 3),
        "questions": 3,
        "repeats": 3,
    }
    assert clocked == [(["a"] * 3, carried, False), (["a"] * 3, {}, False)] * 3
    assert dict(remembering.edits.overlays) == carried


def test_weights_are_measured_once(make_model, requests, clocked):
    model = make_model("gptj")
    model.apply(Counting().edit(model, requests))
    found = question_milliseconds(model, requests[:1], SETTINGS, 1e6)
    assert found["before"] == found["after"] == pytest.approx(100 / 3)
    assert len(clocked) == 3


@pytest.mark.parametrize("edits", [1, 15, 16, 50, 3000])
def test_sixteen_requests_are_timed_drawn_from_all(edits, make_model, clocked):
    requests = [EditRequest(str(i), "France", "{} is", "Rome") for i in range(edits)]
    found = question_milliseconds(make_model("gptj"), requests, SETTINGS, 1e6)
    cases = [int(case) for (case,), _, _ in clocked]
    few = min(edits, 16)
    assert cases[:few] * 3 == cases
    assert len({*cases}) == few == found["questions"]
    assert max(cases) - min(cases) >= 0.7 * (edits - 1)


def test_what_takes_too_long_ends_early(make_model, clocked):
    """A pass takes 0.1 s, the first and the fourth 5 s; 2% of the evaluation are left for all."""
    requests = [EditRequest(str(i), "France", "{} is", "Rome") for i in range(50)]
    model = make_model("gptj")
    for seconds, asked in ((0, 2), (240, 2), (300, 4), (522.5, 7), (600, 16)):
        del clocked[:]
        found = question_milliseconds(model, requests, SETTINGS, seconds)
        assert found["questions"] == asked, seconds
        assert found["repeats"] == (1 if asked < 16 else 2)


@pytest.mark.parametrize(
    ("pipeline", "arguments"),
    [(run_consecutive, ()), (run_breadth_first, ()), (run_batches, (2,))],
)
def test_every_pipeline_notes_milliseconds(pipeline, arguments, make_model, requests, tmp_path):
    model = make_model("gptj", torch.float32)
    outcome = outcome_of(model, Counting(), requests, tmp_path, pipeline, *arguments)
    assert outcome.question_milliseconds["after"] > 0


def test_a_resumed_batch_keeps_what_the_first_one_noted(make_model, requests, tmp_path):
    """A run that is killed in its second batch has weighed and timed in its first."""

    class Killed(Counting):
        def edit(self, model, requests):
            if requests[0].case_id == "b":
                raise KeyboardInterrupt
            return super().edit(model, requests)

    with pytest.raises(KeyboardInterrupt):
        outcome_of(make_model("gptj", torch.float32), Killed(), requests, tmp_path, run_batches, 1)
    model = make_model("gptj", torch.float32)
    outcome = outcome_of(model, Counting(), requests, tmp_path, run_batches, 1)
    assert outcome.bytes == [{"edits_done": 1, "change": 4 * D * M, "state": 4}]
    assert outcome.question_milliseconds["after"] > 0


def test_predictions_do_not_depend_on_what_is_noted(make_model, requests, tmp_path, monkeypatch):
    model = make_model("llama")
    editor = build_editor("grace", {"layer": 1, "steps": 1}, {})
    whole = outcome_of(model, editor, requests, tmp_path / "a").predictions
    model.revert()
    monkeypatch.setattr("kmebench.pipelines.pipelines.bytes_left", lambda *_: {})
    monkeypatch.setattr("kmebench.pipelines.pipelines.question_milliseconds", lambda *_: {})
    again = outcome_of(model, editor, requests, tmp_path / "b").predictions
    pd.testing.assert_frame_equal(whole, again, check_exact=True)
