"""KN: which neurons are kept, and what is written into their values."""

import dataclasses

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.contexts import contexts_from_state
from kmebench.editors.kn.attribution import attribute
from kmebench.editors.kn.kn import knowledge_neurons
from kmebench.edits.weights import Columns, Rows
from kmebench.errors import ConfigError
from kmebench.evaluation.predict import Settings
from kmebench.pipelines.checkpoints import Checkpoints
from kmebench.pipelines.pipelines import Setup, run_batches, run_consecutive
from tests.conftest import in_turn

HPARAMS = {"steps": 3, "prompts": 4, "threshold": 0.1, "share": 0.25}


def kn(**hparams):
    return build_editor("kn", HPARAMS | hparams, {})


def first_token(model, request, target):
    return model.encode([(request.filled_prompt, target)])[0].target_ids[0]


def test_kept_neurons_are_those_of_a_literal_set_computation():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(10, 3, 20, generator=generator)
    for threshold, share in [(0.2, 0.4), (0.3, 0.2), (0.1, 0.7), (0.5, 0.1)]:
        coarse = []
        for prompt in scores.tolist():
            largest = max(max(layer) for layer in prompt)
            coarse.append(
                {
                    (layer, j)
                    for layer in range(3)
                    for j in range(20)
                    if prompt[layer][j] > threshold * largest
                }
            )
        few = round(share * 10)
        expected = {node for node in set.union(*coarse) if sum(node in c for c in coarse) > few}
        kept = knowledge_neurons(scores, threshold, share)
        assert sorted(map(tuple, kept.nonzero().tolist())) == sorted(expected)
        assert expected or threshold == 0.1


def test_a_share_of_the_prompts_is_counted_without_rounding():
    scores = torch.tensor([1.0] * 7 + [-1.0] * 18).reshape(25, 1, 1).repeat(1, 1, 2)
    scores[:, 0, 1] = 2.0
    assert knowledge_neurons(scores, 0.4, 0.27).tolist() == [[True, True]]  # 7 of 25 is 0.28
    assert knowledge_neurons(scores, 0.4, 0.28).tolist() == [[False, True]]
    many = torch.tensor([1.0] * 29 + [-1.0] * 71).reshape(100, 1, 1).repeat(1, 1, 2)
    many[:, 0, 1] = 2.0
    assert 0.29 * 100 < 29
    assert knowledge_neurons(many, 0.4, 0.29).tolist() == [[False, True]]


@pytest.mark.parametrize("hparams", [{"steps": 1}, {"prompts": 0}])
def test_one_point_of_an_integral_and_no_prompt_are_refused(hparams):
    with pytest.raises(
        ConfigError,
        match=r"^(steps|prompts) cannot be \d in the editor 'kn': .* greater than or equal to",
    ):
        kn(**hparams)


def test_a_share_of_all_prompts_is_refused():
    with pytest.raises(
        ConfigError, match=r"^share cannot be 1\.0 in the editor 'kn': .* less than 1"
    ):
        kn(share=1.0)


def test_where_no_attribution_is_positive_no_neuron_is_kept():
    assert not knowledge_neurons(torch.zeros(4, 2, 3), 0.2, 0.4).any()
    assert not knowledge_neurons(-torch.rand(4, 2, 3) - 0.1, 0.2, 0.4).any()


@pytest.mark.parametrize(("family", "true_answer"), in_turn(["named", "argmax"]))
def test_values_of_kept_neurons_move_from_the_old_embedding_to_the_new(
    family, true_answer, make_model, requests
):
    model, request = make_model(family), requests[0]
    old = first_token(model, request, request.target_true)
    if true_answer == "argmax":
        request = dataclasses.replace(request, target_true=None)
        ids = model.tokenizer(request.filled_prompt)["input_ids"]
        old = int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    new = first_token(model, request, request.target_new)
    editor = kn()
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    delta = editor.edit(model, [request])
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())

    contexts = contexts_from_state(editor.state_dict())
    templates = [template for group in contexts for template in group]
    assert len(templates) == 4
    assert templates[0] == "{}"
    counts = torch.zeros(model.n_layers, model.ffn_width)
    for template in templates:
        ids = model.tokenizer(template.replace("{}", request.filled_prompt))["input_ids"]
        scores = attribute(model, ids, old, steps=3, micro_batch=5)
        counts += scores > 0.1 * scores.max()
    embedding = model.model.get_input_embeddings().weight
    expected = dict(before)
    for layer, j in (counts >= 2).nonzero().tolist():
        weight = expected[model.ffn[layer].value.weight_name].clone()
        value = weight.movedim(model.ffn[layer].value.axis, 0)[j]
        value += -2 * embedding[old] + 2 * embedding[new]
        expected[model.ffn[layer].value.weight_name] = weight
    assert (counts >= 2).any()
    model.apply(delta)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-12)
    kind = Rows if family == "gpt2" else Columns
    assert all(type(part) is kind for part in delta.values())


def test_requests_of_one_call_are_edited_one_by_one_on_the_given_model(make_model, requests):
    model, editor = make_model("gptj"), kn()
    together = editor.edit(model, requests)
    apart = [kn().edit(model, [request]) for request in requests]
    for name in {n for delta in apart for n in delta}:
        shape = model.parameter(name).shape
        expected = sum(d[name].dense(shape) for d in apart if name in d)
        torch.testing.assert_close(together[name].dense(shape), expected)
    assert set(together) == {n for delta in apart for n in delta}


def test_no_neuron_is_an_edit_that_changes_nothing(make_model, requests, caplog):
    caplog.set_level("INFO", logger="kmebench")
    delta = kn(threshold=1.0).edit(make_model("llama", torch.float32), requests[:1])
    assert dict(delta) == {}
    assert "kn: request 'a' has 0 neurons" in caplog.text


def test_contexts_are_sampled_once_and_survive_a_round_trip(make_model, requests):
    model, editor = make_model("gpt2", torch.float32), kn()
    model.apply(editor.edit(model, requests[:1]))
    state = {name: t.clone() for name, t in editor.state_dict().items()}
    for layer in range(model.n_layers):
        model.parameter(model.ffn[layer].value.weight_name).normal_()  # would say other things
    editor.edit(model, requests[1:2])
    restored = kn()
    restored.load_state_dict(state)
    for one in (editor, restored):
        assert all(torch.equal(one.state_dict()[n], t) for n, t in state.items())
    fresh = kn()
    fresh.edit(model, requests[1:2])
    assert contexts_from_state(fresh.state_dict()) != contexts_from_state(state)
    editor.load_state_dict({})
    assert editor.state_dict() == {}


def test_sampling_leaves_the_global_generator_alone(make_model, requests):
    state = torch.get_rng_state()
    model = make_model("llama", torch.float32)
    state = torch.get_rng_state()
    kn().edit(model, requests[:1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_equals_an_uninterrupted_one(make_model, requests, tmp_path):
    def run(editor, folder):
        model = make_model("gptj", torch.float32)
        checkpoints = Checkpoints(tmp_path / folder, 1, {})
        return run_consecutive(
            Setup(model, editor, Settings(wild_max_tokens=1), checkpoints), requests
        )

    straight, failing = run(kn(), "a"), kn()
    edit = failing.edit

    def fail_at_the_second(model, batch):
        if batch[0] is requests[1]:
            raise KeyboardInterrupt
        return edit(model, batch)

    failing.edit = fail_at_the_second
    with pytest.raises(KeyboardInterrupt):
        run(failing, "b")
    resumed = run(kn(), "b")
    assert straight.edit.weights.norms() == resumed.edit.weights.norms()
    for name, part in straight.edit.weights.items():
        assert torch.equal(part.values, resumed.edit.weights[name].values)


def test_each_batch_starts_from_the_original_model(make_model, requests, tmp_path):
    settings = Settings(wild_max_tokens=1)
    model = make_model("llama", torch.float32)
    outcome = run_batches(
        Setup(model, kn(), settings, Checkpoints(tmp_path / "a", 1, {})), requests[:2], 1
    )
    alone = run_batches(
        Setup(model, kn(), settings, Checkpoints(tmp_path / "b", 1, {})), requests[1:2], 1
    )
    assert outcome.norms[1] == alone.norms[0]


def test_bfloat16_models_get_a_float32_delta(make_model, requests):
    model = make_model("llama", torch.bfloat16)
    delta = kn().edit(model, requests)
    assert delta
    assert all(part.values.dtype == torch.float32 for part in delta.values())
    model.apply(delta)


def test_an_edit_makes_a_trained_model_forget_the_old_answer(trained, capital_requests):
    editor = build_editor("kn", {}, {})
    fell = []
    for request in capital_requests[:4]:
        (item,) = trained.encode([(request.filled_prompt, request.target_true)])
        batch = trained.collate([item])

        def old_probability(batch=batch, item=item):
            with torch.no_grad():
                return float(trained.answer_logits(batch)[0].softmax(-1)[item.target_ids[0]])

        before = old_probability()
        trained.apply(editor.edit(trained, [request]))
        fell.append((before, old_probability()))
        trained.revert()
        assert old_probability() == before
    assert all(after < 0.7 * before for before, after in fell), fell
