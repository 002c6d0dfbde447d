"""LoRA-Merge: two groups against dense weights and a mean written out."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.edits.edit import Edit
from kmebench.errors import ConfigError
from kmebench.evaluation.predict import Settings
from kmebench.models.layouts import adapted_modules, layout_of
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches
from tests.conftest import FAMILIES
from tests.pipelines.runs import killed_and_resumed

RATE, STEPS, SCALE, MEAN = 0.02, 3, 6 / 2, 0.25
HPARAMS = {"rank": 2, "alpha": 6, "dropout": 0.0, "learning_rate": RATE, "steps": STEPS}
HPARAMS |= {"mini_batch": 2, "merge_weight": MEAN}


def lora_merge(**hparams):
    return build_editor("lora-merge", HPARAMS | hparams, {})


def names_of(model):
    return [f"{n}.weight" for n in adapted_modules(model.model, layout_of(model.model.config))]


def product(family, a, b):
    """(alpha / r) B A as the family stores weights."""
    return SCALE * (b @ a).T if family == "gpt2" else SCALE * b @ a


def literal(model, family, weights, start, requests):
    """Train dense W_t + (alpha / r) B A by the definition; return the mean with W_t.

    ``weights`` W_t and ``start`` (A, B) by parameter name. Every text by itself, every target
    token of a mini-batch with the same weight.
    """
    factors = {n: [f.clone().requires_grad_() for f in pair] for n, pair in start.items()}
    adam = torch.optim.Adam([f for pair in factors.values() for f in pair])
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])

    def adapted():
        return {n: weights[n] + product(family, *pair) for n, pair in factors.items()}

    for k in range(STEPS):
        adam.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * k / STEPS))
        for group in (encoded[:2], encoded[2:]):
            if not group:
                continue
            adam.zero_grad()
            total = 0
            for item in group:
                said = torch.func.functional_call(
                    model.model, adapted(), kwargs={"input_ids": torch.tensor([item.ids])}
                ).logits[0, -item.n_target - 1 : -1]
                total = total + cross_entropy(said, torch.tensor(item.target_ids), reduction="sum")
            (total / sum(item.n_target for item in group)).backward()
            adam.step()
    return {
        n: ((1 - MEAN) * weights[n] + MEAN * trained).detach() for n, trained in adapted().items()
    }


def fresh(model, requests):
    """The factors that the next call starts from; the generator stays where it is."""
    with torch.random.fork_rng():
        factors = lora_merge(steps=0).trained(model, requests, {})
    return {f"{name}.weight": pair for name, pair in factors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_groups_are_folded_in_as_the_definition_says(family, make_model, requests):
    model, editor = make_model(family), lora_merge(micro_batch=1)
    assert (
        len({len(e.target_ids) for e in model.encode([("a", r.target_new) for r in requests])}) > 1
    )
    expected = {n: model.parameter(n).detach().clone() for n in names_of(model)}
    torch.manual_seed(1)
    for group in (requests, requests[1:2]):
        start = fresh(model, group)
        assert all(a.any() and not b.any() for a, b in start.values())
        expected = literal(model, family, expected, start, group)
        model.apply(editor(model, group).edit)
        for name, weight in expected.items():
            torch.testing.assert_close(model.parameter(name).detach(), weight, rtol=1e-6, atol=1e-8)
    assert editor.steps == STEPS
    assert editor.state_dict() == {}


def test_the_change_is_proportional_to_the_weight_of_the_mean(make_model, requests):
    model, changes = make_model("llama"), []
    for weight in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        edit = lora_merge(merge_weight=weight)(model, requests).edit
        changes.append({n: p.dense(model.parameter(n).shape) for n, p in edit.weights.items()})
    none, quarter, whole = changes
    for name in whole:
        assert not none[name].any()
        torch.testing.assert_close(4 * quarter[name], whole[name], rtol=1e-12, atol=0)
        assert torch.linalg.matrix_rank(whole[name]) == 2


def test_every_group_adds_a_rank_of_its_own(make_model, requests):
    """Unlike LoRA, whose one adapter trains on and may overwrite what earlier edits wrote."""
    model, editor, ranks = make_model("llama"), lora_merge(), []
    for request in requests:
        model.apply(editor(model, [request]).edit)
        name = names_of(model)[0]
        change = model.edits.total().weights[name].dense(model.parameter(name).shape)
        ranks.append(int(torch.linalg.matrix_rank(change, rtol=1e-9)))
    assert ranks == [2, 4, 6]


def test_batches_do_not_see_each_other_and_turns_resume(make_model, requests, tmp_path):
    settings = Settings(wild_max_tokens=1)
    model = make_model("llama", torch.float32)

    def seeded(editor):
        torch.manual_seed(2)
        return editor

    setup = Setup(model, seeded(lora_merge(dropout=0.1)), settings, Checkpoints(tmp_path, 9, {}))
    outcome = run_batches(setup, requests, 2)
    editor = seeded(lora_merge(dropout=0.1))
    apart = [editor(model, batch).edit for batch in (requests[:2], requests[2:])]
    assert outcome.norms == [edit.weights.norms() for edit in apart]

    def make():
        return make_model("llama", torch.float32), lora_merge(dropout=0.1)

    killed_and_resumed(make, requests, tmp_path, 2)


def test_it_learns_and_leaves_the_model_as_it_was(make_model, requests):
    model = make_model("gptj", torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    edit = lora_merge(steps=15, learning_rate=0.03, merge_weight=1.0)(model, requests[:1]).edit
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    assert isinstance(edit, Edit)
    (item,) = model.encode([(requests[0].filled_prompt, requests[0].target_new)])

    def loss():
        batch = model.collate([item])
        return float(cross_entropy(model.answer_logits(batch), batch.labels))

    old = loss()
    model.apply(edit)
    assert loss() < 0.5 * old


def test_a_weight_beyond_one_is_no_mean():
    with pytest.raises(ConfigError, match=r"^merge_weight cannot be 1.5 in the editor"):
        lora_merge(merge_weight=1.5)
