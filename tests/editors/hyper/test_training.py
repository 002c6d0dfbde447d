"""The stage ``hypernetwork``: its gradient against autograd, its states, its sentences."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kmebench.editors.hyper import training as stage
from kmebench.editors.hyper.base import factors_of
from kmebench.editors.hyper.network import Hypernetwork
from kmebench.editors.hyper.training import Training, examples, train
from kmebench.editors.rows import Rows
from kmebench.errors import ConfigError, EditError, KMEBenchError
from kmebench.memory import NoMemoryError
from kmebench.pipelines.pipelines import Setup, run_batches, run_consecutive
from kmebench.preemption import PreemptedError
from tests.conftest import FAMILIES
from tests.editors.hyper.networks import editor_of, fresh, ready
from tests.editors.hyper.test_mend import close
from tests.pipelines.runs import SETTINGS, checkpoints

EDITORS = ("mend", "malmen")


def never():
    return None


def training_of(editor, model, requests, folder):
    micro_batch = editor.hparams.micro_batch
    return Training(editor, model, requests, folder / "partial", {}, micro_batch)


# -- the gradient -----------------------------------------------------------------------


def edited_parameters(sites, factors):
    """The stored weights with the change of every site added, with their graph."""
    found = {}
    for (projection, is_value), (u, v) in zip(sites, factors, strict=True):
        change = u @ v  # [out, in]
        stored = change if (projection.axis == 1) == is_value else change.T
        before = list(stored.shape)
        before[projection.axis] = projection.offset
        full = torch.cat([stored.new_zeros(before), stored], dim=projection.axis)
        found[projection.weight_name] = projection.weight + full
    return found


def logits_of(model, ids, parameters):
    return functional_call(model.model, parameters, (torch.tensor([ids]),)).logits[0]


def literal_loss(editor, model, sites, factors, group):
    """The loss of a group through the whole edited model, text by text."""
    weights, total = edited_parameters(sites, factors), 0
    for each in group:
        (item,) = model.encode([each.paraphrase])
        logits = logits_of(model, item.ids[:-1], weights)[-item.n_target :]
        total = total + editor.hparams.edit_weight * cross_entropy(
            logits, torch.tensor(item.target_ids)
        )
        (item,) = model.encode([each.locality])
        asked = item.n_target if editor.name == "malmen" else len(item.ids) - 1
        before, after = (
            logits_of(model, item.ids[:-1], parameters)[-asked:].log_softmax(-1)
            for parameters in ({}, weights)
        )
        total = total + (before.exp() * (before - after)).sum() / asked
    return total / len(group)


def prepared(name, model, requests, folder, groups, edits):
    """A training before a step, its weights moved, with what its step draws and sees."""
    editor = editor_of(name, edits=edits, groups=groups, edit_weight=0.3, micro_batch=2)
    training = training_of(editor, model, requests, folder)
    training.network.load_state_dict(fresh(editor, model, moved=0.1).state_dict())
    training.network.step_sizes.data.fill_(0.02)
    drawn = examples(requests, edits * groups, 0, 0)
    edited = [each.request for each in drawn]
    seen = editor.traced(model, training.sites, edited, training.micro_batch)
    training.network.learn_moments([Rows.joint(parts) for parts in zip(*seen, strict=True)])
    return training, drawn, seen


@pytest.mark.parametrize(
    ("name", "groups", "edits"), [("mend", 3, 1), ("mend", 1, 2), ("malmen", 1, 3)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_the_split_gradient_is_autograds_through_the_whole_edited_model(
    name, groups, edits, family, make_model, requests, tmp_path
):
    model = make_model(family)
    training, drawn, seen = prepared(name, model, requests, tmp_path, groups, edits)
    before = {key: p.clone() for key, p in model.model.named_parameters()}
    states, expected = training._states([each.locality for each in drawn]), 0
    for start in range(0, len(drawn), edits):
        own = slice(start, start + edits)
        losses = training.learn(drawn[own], seen[own], states[own])
        with torch.enable_grad():
            factors = factors_of(training.network, seen[own])
            part = literal_loss(training.editor, model, training.sites, factors, drawn[own])
        close((0.3 * losses[0] + losses[1]).mean(), part.detach(), 1e-10)
        expected = expected + part / groups
    parameters = dict(training.network.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.abs().max() > 0, key
        close(parameter.grad, gradient, 1e-8)
    assert all(torch.equal(before[key], p) for key, p in model.model.named_parameters())


@pytest.mark.parametrize("name", EDITORS)
def test_the_gradient_is_what_finite_differences_say(name, make_model, requests, tmp_path):
    model = make_model("llama")
    training, drawn, seen = prepared(name, model, requests, tmp_path, 1, 2)
    states = training._states([each.locality for each in drawn])
    training.learn(drawn, seen, states)
    gradients = [(p.data.view(-1), p.grad.view(-1).clone()) for p in training.network.parameters()]
    for entry, gradient in gradients:
        place = int(gradient.abs().argmax())
        losses = []
        for shift in (1e-5, -2e-5):
            entry[place] += shift
            edit, locality = training.learn(drawn, seen, states)
            losses.append(float((0.3 * edit + locality).mean()))
        entry[place] += 1e-5
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(gradient[place]), rel=1e-5)


# -- moments ----------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_of_all_steps(make_model, requests, tmp_path):
    editor, model = editor_of("mend", groups=2), make_model("llama")
    training = training_of(editor, model, requests, tmp_path)
    rows = {}
    for step in range(3):
        for each in examples(requests, 2, 0, step):
            for part in editor.traced(model, training.sites, [each.request], 1)[0]:
                rows.setdefault(part.shape, []).append(part.joined.numpy())
        training.step(step)
    assert set(rows) == set(training.network.moments)
    for shape, parts in rows.items():
        every, moments = np.concatenate(parts), training.network.moments[shape]
        assert int(moments.count) == len(every)
        np.testing.assert_allclose(moments.mean, every.mean(axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            moments.deviation, every.std(axis=0, ddof=1), rtol=1e-7, atol=1e-12
        )


# -- learning ---------------------------------------------------------------------------


def test_a_step_draws_each_record_once_and_the_same_every_time(requests):
    many = [replace(r, case_id=f"{r.case_id}{i}") for i in range(4) for r in requests]
    steps = [examples(many, 5, 0, step) for step in range(4)]
    for drawn in steps:
        assert len({each.request.case_id for each in drawn}) == 5
        for request, paraphrase, locality in drawn:
            assert paraphrase == (request.paraphrases[0], request.target_new)
            assert locality in request.locality
    assert steps[0] == examples(many, 5, 0, 0)
    assert steps[0] != steps[1]
    assert examples(many, 5, 1, 0) != steps[0]


def test_a_step_is_adams_with_a_rate_for_the_step_sizes_and_a_bound_for_gradients(
    make_model, requests, tmp_path
):
    """Adam's first step moves a parameter by its rate, whatever the gradient."""
    editor = editor_of("mend", groups=3, learning_rate=1e-3, step_size_rate=1e-2, clip=1e-4)
    training = training_of(editor, make_model("llama"), requests, tmp_path)
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    training.step(0)
    gradients = [p.grad for p in training.network.parameters()]
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) == pytest.approx(1e-4)
    for name, parameter in training.network.named_parameters():
        rate = 1e-2 if name == "step_sizes" else 1e-3
        if parameter.grad.abs().max() > 1e-7:  # Adam's epsilon is 1e-8
            moved = float((parameter.detach() - before[name]).abs().max())
            assert moved == pytest.approx(rate, rel=0.1), name


@pytest.mark.parametrize(
    ("name", "edits", "groups", "step_size"), [("mend", 1, 3, 1e-3), ("malmen", 3, 1, 1e-3)]
)
def test_training_lowers_the_loss(name, edits, groups, step_size, make_model, requests, tmp_path):
    editor = editor_of(
        name,
        edits=edits,
        groups=groups,
        step_size=step_size,
        steps=40,
        learning_rate=3e-3,
        step_size_rate=1e-3,
        edit_weight=1.0,
        clip=1.0,
        rank=8,
    )
    history = tmp_path / "history.json"
    train(tmp_path / "n", history, make_model("llama", torch.float32), requests, editor, code={})
    noted = json.loads(history.read_text())
    totals = [each["edit"] + each["locality"] for each in noted["losses"]]
    assert len(totals) == 40
    assert noted["records"] == 3
    assert np.mean(totals[-5:]) < 0.9 * np.mean(totals[:5])


def loss_of_paraphrase(model, request):
    batch = model.collate(model.encode([(request.paraphrases[0], request.target_new)]))
    return float(cross_entropy(model.answer_logits(batch), batch.labels))


@pytest.mark.parametrize(("name", "edits", "groups"), [("mend", 1, 3), ("malmen", 3, 1)])
def test_a_trained_network_edits_facts_that_it_never_saw(
    name, edits, groups, trained, capital_requests, tmp_path
):
    """Trained on seven capitals; a paraphrase of each of three others takes on the new answer."""
    hparams = {"value_layers": (2, 3), "key_layers": (2, 3), "rank": 16, "steps": 20}
    hparams |= {"edits": edits, "groups": groups, "edit_weight": 1.0, "clip": 1.0}
    hparams |= dict.fromkeys(("step_size", "learning_rate", "step_size_rate"), 2e-3)
    editor = editor_of(name, **hparams)
    path = tmp_path / "network"
    train(path, tmp_path / "history", trained, capital_requests[:7], editor, code={})
    editor = editor_of(name, {"hypernetwork": path}, **hparams)
    for request in capital_requests[7:]:
        before = loss_of_paraphrase(trained, request)
        trained.apply(editor.edit(trained, [request]))
        after = loss_of_paraphrase(trained, request)
        trained.revert()
        assert after < before - 2


# -- saved states -----------------------------------------------------------------------


def train_into(name, model, requests, folder, stopped_by=never, **hparams):
    """Train into a folder; return the bytes of the network and the losses."""
    editor = editor_of(name, **{"steps": 20} | hparams)
    path, history = folder / "network", folder / "history.json"
    train(path, history, model, requests, editor, code={"a.py": "1"}, stopped_by=stopped_by)
    return path.read_bytes(), json.loads(history.read_text())["losses"]


class Stopped:
    """A signal that comes in some step."""

    def __init__(self, step):
        self.left = step

    def __call__(self):
        self.left -= 1
        return "SIGTERM" if self.left == 0 else None


@pytest.mark.parametrize("name", EDITORS)
def test_a_stopped_training_goes_on_with_the_same_bytes(name, make_model, requests, tmp_path):
    model = make_model("llama", torch.float32)
    straight = train_into(name, model, requests, tmp_path / "a")
    with pytest.raises(PreemptedError, match="Stopped by SIGTERM after 7 of 20 steps, which are"):
        train_into(name, model, requests, tmp_path / "b", Stopped(7))
    assert not (tmp_path / "b" / "network").exists()
    resumed = train_into(name, model, requests, tmp_path / "b")
    assert resumed == straight
    assert [path.name for path in sorted((tmp_path / "b").iterdir())] == ["history.json", "network"]


class KilledError(Exception):
    pass


def kill_at(monkeypatch, step, error=KilledError):
    own = Training.step

    def counted(self, number):
        if number == step:
            raise error
        return own(self, number)

    monkeypatch.setattr(Training, "step", counted)
    return lambda: monkeypatch.setattr(Training, "step", own)


def steps_taken(monkeypatch):
    taken, own = [], Training.step
    monkeypatch.setattr(
        Training, "step", lambda self, number: (taken.append(number), own(self, number))[1]
    )
    return taken


def test_a_killed_training_goes_on_from_the_last_tenth(make_model, requests, tmp_path, monkeypatch):
    model = make_model("llama", torch.float32)
    straight = train_into("mend", model, requests, tmp_path / "a")
    revive = kill_at(monkeypatch, 13)
    with pytest.raises(KilledError):
        train_into("mend", model, requests, tmp_path / "b")
    revive()
    taken = steps_taken(monkeypatch)
    assert train_into("mend", model, requests, tmp_path / "b") == straight
    assert taken == list(range(12, 20))


@pytest.mark.parametrize("other", ["values", "requests", "weights", "damaged"])
def test_a_state_of_another_training_or_a_damaged_one_is_left(
    other, make_model, requests, tmp_path, monkeypatch
):
    model = make_model("llama", torch.float32)
    revive = kill_at(monkeypatch, 13)
    with pytest.raises(KilledError):
        train_into("mend", model, requests, tmp_path)
    revive()
    hparams = {"seed": 1} if other == "values" else {}
    if other == "requests":
        requests = [*requests[:2], replace(requests[2], target_new="Paris")]
    if other == "weights":
        model.ffn[1].value.weight.data[0, 0] += 1
    if other == "damaged":
        partial = tmp_path / "network.partial"
        partial.write_bytes(partial.read_bytes()[:-100])
    taken = steps_taken(monkeypatch)
    train_into("mend", model, requests, tmp_path, **hparams)
    assert taken == list(range(20))


# -- sentences --------------------------------------------------------------------------


def test_too_few_records_are_a_sentence(make_model, requests, tmp_path):
    bare = [requests[0], replace(requests[1], paraphrases=()), replace(requests[2], locality=())]
    with pytest.raises(ConfigError, match=r"mend: a step .* takes 2 records .* has 1 with"):
        train_into("mend", make_model("llama"), bare, tmp_path)


def test_a_training_that_diverges_is_a_sentence(make_model, requests, tmp_path):
    with pytest.raises(EditError, match=r"mend: training became NaN .* step \d+; lower"):
        train_into("mend", make_model("llama", torch.float32), requests, tmp_path, step_size=1e38)


def test_out_of_memory_halves_the_pass_and_then_is_a_sentence(
    make_model, requests, tmp_path, monkeypatch
):
    model, limit, own = make_model("llama", torch.float32), [2], stage.text_losses

    def small(model, batch, states):
        if len(batch.counts) > limit[0]:
            raise torch.OutOfMemoryError("no room")
        return own(model, batch, states)

    values = {"edits": 2, "groups": 1, "micro_batch": 2}
    straight = train_into("malmen", model, requests, tmp_path / "a", **values | {"micro_batch": 1})
    monkeypatch.setattr(stage, "text_losses", small)
    halved = train_into("malmen", model, requests, tmp_path / "b", **values)
    for a, b in zip(straight[1], halved[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    limit[0] = 1
    with pytest.raises(NoMemoryError, match="Out of memory while training malmen, 1 at once"):
        train_into("malmen", model, requests, tmp_path / "c", **values)


# -- files and pipelines ----------------------------------------------------------------


@pytest.mark.parametrize("name", EDITORS)
def test_a_network_is_read_back_and_of_others_refused(name, make_model, requests, tmp_path):
    model = make_model("llama")
    editor, network = ready(name, model, tmp_path / "n", moved=0.3)
    shapes = [site.shape for site in editor.sites(model)]
    again = editor.network.load(tmp_path / "n", shapes, editor.hparams)
    assert isinstance(again, Hypernetwork)
    for key, tensor in network.tensors().items():
        assert torch.equal(again.tensors()[key], tensor), key
    other = editor_of(name, {"hypernetwork": tmp_path / "n"}, rank=4)
    with pytest.raises(KMEBenchError, match="of another model or trained with other values"):
        other.edit(model, requests)
    with pytest.raises(KMEBenchError, match="of another model or trained with other values"):
        editor.edit(make_model("llama", width=32), requests)
    assert editor_of(name, {"hypernetwork": tmp_path / "n"}, micro_batch=1).edit(model, requests)


@pytest.mark.parametrize("name", EDITORS)
def test_it_edits_in_batches_turns_and_one_after_another(name, make_model, requests, tmp_path):
    model = make_model("llama", torch.float32)
    weights = {key: p.clone() for key, p in model.model.named_parameters()}
    moved = 0
    for turn in (None, 1, 2):
        editor, _ = ready(name, model, tmp_path / "n", moved=0.1)
        setup = Setup(model, editor, SETTINGS, checkpoints(tmp_path / f"{turn}"))
        if turn is None:
            outcome = run_batches(setup, requests, 2)
        else:
            outcome = run_consecutive(setup, requests, turn)
            parts = outcome.edit.weights
            assert set(parts) == {site.projection.weight_name for site in editor.sites(model)}
            moved += sum(parts.norms().values())
            model.revert()
        assert len(outcome.times) == {None: 2, 1: 3, 2: 2}[turn]
        assert all(torch.equal(weights[key], p) for key, p in model.model.named_parameters())
    assert moved > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_edited(family, make_model, requests, tmp_path):
    model = make_model(family, torch.float32)
    for name in EDITORS:
        train_into(name, model, requests, tmp_path / name, steps=2)
        editor = editor_of(name, {"hypernetwork": tmp_path / name / "network"}, steps=2)
        assert editor(model, requests).edit.is_finite()
