"""Packed impact scores against dense autograd, and the size of what they allocate."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kmebench.editors.pac.gradients import KEY, VALUE
from kmebench.editors.pac.impact import segment_scores, trace
from tests.conftest import FAMILIES


def dense_gradients(model, request):
    """Full weight gradients of the mean target loss, as [D, M] per layer and matrix."""
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    ids = torch.tensor([item.ids])
    weights = {(i, m): (f.key, f.value)[m] for i, f in enumerate(model.ffn) for m in (KEY, VALUE)}
    for projection in weights.values():
        projection.weight.requires_grad_(True)
    logits = model.model(input_ids=ids).logits[0, -item.n_target - 1 : -1]
    loss = cross_entropy(logits, torch.tensor(item.target_ids))
    tensors = [p.weight for p in weights.values()]
    gradients = torch.autograd.grad(loss, tensors)
    for projection in weights.values():
        projection.weight.requires_grad_(False)
    return {
        place: gradient.movedim(projection.axis, -1)[..., projection.offset :]
        for (place, projection), gradient in zip(weights.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_dense_gradients(family, make_model, requests):
    model = make_model(family)
    impact = trace(model, requests)
    for row, request in enumerate(requests):
        for (layer, matrix), gradient in dense_gradients(model, request).items():
            # The cache is float32; the computation behind it is float64 here.
            l2 = torch.linalg.vector_norm(gradient, dim=0).float()
            total = gradient.sum(dim=0).float()
            torch.testing.assert_close(impact.l2[row, layer, matrix], l2, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                impact.signed_sum[row, layer, matrix], total, rtol=1e-5, atol=1e-5
            )


def test_segment_scores_are_exact_in_float64():
    torch.manual_seed(0)
    residual, coefficient = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 11).double()
    gradient = torch.einsum("etd,etm->edm", residual, coefficient)
    scores = segment_scores(residual, coefficient)
    torch.testing.assert_close(scores["l2"], gradient.norm(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores["signed_sum"], gradient.sum(dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_scores_the_same_alone_and_in_a_batch(family, make_model, requests):
    model = make_model(family)
    together = trace(model, requests)
    for row, request in enumerate(requests):
        alone = trace(model, [request])
        torch.testing.assert_close(together.l2[row], alone.l2[0])
        assert together.answers[row] == alone.answers[0]


def test_answers_are_the_argmax_at_the_answer_positions(make_model, requests):
    model = make_model("llama")
    (answer,) = trace(model, requests[1:2]).answers
    (item,) = model.encode([(requests[1].filled_prompt, requests[1].target_new)])
    logits = model.model(input_ids=torch.tensor([item.ids])).logits[0]
    assert list(answer) == logits[-item.n_target - 1 : -1].argmax(-1).tolist()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor any operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and not _aliases(tensor, args):
                self.largest = max(self.largest, tensor.numel())
        return result


def _aliases(tensor, args):
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    return any(
        tensor.untyped_storage().data_ptr() == i.untyped_storage().data_ptr() for i in inputs
    )


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_tracing_allocates_nothing_of_a_weights_size(family, make_model, requests):
    model = make_model(family, width=4096)
    weight = model.ffn[0].key.weight.numel()
    scores = len(requests[:1]) * model.n_layers * 2 * 4096  # what is returned
    with LargestTensor() as spy:
        trace(model, requests[:1])
    assert spy.largest < weight
    assert spy.largest <= max(scores, 12 * 4096)  # T·M


def test_the_spy_sees_a_dense_gradient(make_model, requests):
    model = make_model("llama", width=4096)
    with LargestTensor() as spy:
        dense_gradients(model, requests[0])
    assert spy.largest >= model.ffn[0].key.weight.numel()
