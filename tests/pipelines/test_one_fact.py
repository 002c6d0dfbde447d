"""Looking closely at one fact."""

import pytest
import torch

from kmebench.editors.base import Editor
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.pipelines.one_fact import critical_shares, edit_facts, likeliest, next_token, says


def test_all_nodes_together_carry_all_impact(trained, capital_requests):
    shares, _ = critical_shares(trained, capital_requests[0], trained.ffn_width, "l2")
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    some, paths = critical_shares(trained, capital_requests[0], 3, "l2")
    torch.testing.assert_close(some, shares[..., :3])
    assert paths.positive.shape == (1, trained.n_layers, 2, 3)


def test_the_likeliest_token_is_what_the_model_says(trained, capital_requests):
    prompt = capital_requests[0].filled_prompt
    probabilities = next_token(trained, prompt)
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    (token, probability), *_ = likeliest(trained, prompt, 2)
    assert probability == float(probabilities.max())
    assert token.strip() == says(trained, prompt, tokens=1) == "Paris"


class InTwo(Editor):
    """Adds one when it edits and two when the run ends."""

    def edit(self, model, requests):
        return self._add(model, 1.0)

    def final_edit(self, model):
        return self._add(model, 2.0)

    def _add(self, model, size):
        name = model.ffn[0].value.weight_name
        return WeightDelta({name: Dense(torch.full(model.parameter(name).shape, size))})


def test_an_edit_of_one_fact_ends_as_a_run_does(trained, capital_requests):
    name = trained.ffn[0].value.weight_name
    before = trained.parameter(name).detach().clone()
    result = edit_facts(trained, InTwo(None, {}), capital_requests[:1])
    torch.testing.assert_close(trained.parameter(name).detach(), before + 3)
    torch.testing.assert_close(result.edit.weights[name].values, torch.full_like(before, 3))
    trained.revert()
