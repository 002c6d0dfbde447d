"""Scores of the released code against dense autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.pac.zscore import abs_zscore, released_scores
from tests.conftest import in_turn


@pytest.mark.parametrize(("family", "layers_per_pass"), in_turn([None, 1, 2]))
def test_scores_equal_those_of_dense_gradients(family, layers_per_pass, make_model, requests):
    model = make_model(family)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    scores = released_scores(
        model, [model.collate(encoded[:2]), model.collate(encoded[2:])], layers_per_pass
    )
    model.model.requires_grad_(True)
    for some in (encoded[:2], encoded[2:]):
        logits = [model.model(torch.tensor([e.ids])).logits[0] for e in some]
        answers = [x[-e.n_target - 1 : -1] for x, e in zip(logits, some, strict=True)]
        labels = torch.tensor([i for e in some for i in e.target_ids])
        cross_entropy(torch.cat(answers), labels).backward()
    assert scores.shape == (model.n_layers, 2, model.ffn_width)
    for layer, ffn in enumerate(model.ffn):
        for matrix, projection in enumerate((ffn.key, ffn.value)):
            gradient = projection.weight.grad.movedim(projection.axis, 1)[:, projection.offset :]
            gradient = gradient.numpy()  # [D, M]
            z = (gradient - gradient.mean(1, keepdims=True)) / gradient.std(
                1, keepdims=True, ddof=1
            )
            torch.testing.assert_close(
                scores[layer, matrix], torch.tensor(abs(z).mean(0)), rtol=1e-4, atol=1e-6
            )


def test_a_constant_row_scores_nothing():
    gradient = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert abs_zscore(gradient).tolist() == [0.5, 0.0, 0.5]
