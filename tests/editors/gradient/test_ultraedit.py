"""UltraEdit against its equations written out, in float64."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.gradient.moments import EPSILON, Moments, packed, unpacked, with_rows
from kmebench.editors.gradient.ultraedit import loss_weights, ridge_change, warm_up
from kmebench.editors.gradients import observed_modules
from kmebench.editors.needs import Pipeline, Trained
from kmebench.editors.rows import Rows
from kmebench.errors import ConfigError, EditError
from tests.conftest import FAMILIES
from tests.pipelines.runs import killed_and_resumed

ALL = {"value_layers": (1, 2), "key_layers": (1,), "gate_layers": (), "learning_rate": 1e-3}
GATED = ("llama", "qwen3", "gemma2", "gemma3_text")
ETA, RHO = 0.3, 0.7


def ultraedit(**hparams):
    return build_editor("ultraedit", ALL | hparams, {})


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    inputs, gradients = 3 * torch.randn(6, 9) + 1, 0.01 * torch.randn(6, 4)
    return Rows(inputs.double(), gradients.double())


@pytest.fixture
def moments(rows):
    torch.manual_seed(1)
    return Moments.zero(rows.joined).with_rows(rows.joined + torch.randn(6, 13).double())


def released_values(rows, moments):
    """V of the notes, row by row."""
    found = []
    for h, g in zip(*rows, strict=True):
        z = torch.cat([h, g])
        sigma = (moments.squares / (int(moments.count) - 1)).sqrt()
        normal = (z - moments.mean) / (sigma + EPSILON)
        found.append(-ETA * normal[:9].square().sum() * normal[9:])
    return torch.stack(found)


def test_the_change_is_the_ridge_minimiser(rows, moments):
    u, v = ridge_change(rows, moments, ETA, RHO)
    change, values = u @ v, released_values(rows, moments)
    slope = rows.inputs.T @ (rows.inputs @ change.T - values) + RHO * change.T
    close(slope / values.abs().max(), torch.zeros(9, 4).double())
    tried = change.clone().requires_grad_()
    objective = (rows.inputs @ tried.T - values).square().sum() + RHO * tried.square().sum()
    (gradient,) = torch.autograd.grad(objective, tried)
    close(gradient / values.abs().max(), torch.zeros(4, 9).double())


def test_it_is_what_the_released_code_solves_with_a_matrix_of_the_inputs_width(rows, moments):
    u, v = ridge_change(rows, moments, ETA, RHO)
    h = rows.inputs
    gram = h.T @ h + RHO * torch.eye(9, dtype=torch.float64)
    dense = torch.linalg.solve(gram, h.T @ released_values(rows, moments)).T
    close(u @ v / dense.abs().max(), dense / dense.abs().max())


@pytest.mark.parametrize("cuts", [(40,), (1, 1, 38), (3, 7, 20, 10), (1,) * 40])
def test_moments_of_parts_are_those_of_all_rows(cuts):
    torch.manual_seed(0)
    every = torch.randn(40, 5).double() * torch.logspace(-6, 2, 5).double() + 100
    moments = Moments.zero(every)
    for part in every.split(cuts):
        moments = moments.with_rows(part)
    assert moments.count == 40
    close(moments.mean, every.mean(dim=0))
    # The released code lets every part count one row too much: 41% at two rows, NaN at one.
    torch.testing.assert_close(moments.deviation, every.std(dim=0), rtol=1e-7, atol=0.0)


def test_one_row_has_no_deviation_and_makes_no_step(rows):
    one = Rows(rows.inputs[:1], rows.gradients[:1])
    moments = Moments.zero(one.joined).with_rows(one.joined)
    assert torch.equal(moments.deviation, torch.zeros(13).double())
    u, v = ridge_change(one, moments, ETA, RHO)
    assert torch.equal(u @ v, torch.zeros(4, 9).double())


def test_modules_of_one_shape_share_their_moments(rows):
    torch.manual_seed(2)
    other = Rows(torch.randn(3, 9).double(), torch.randn(3, 4).double())
    wide = Rows(torch.randn(3, 4).double(), torch.randn(3, 9).double())
    found = with_rows({}, [rows, other, wide])
    assert set(found) == {(9, 4), (4, 9)}
    both = torch.cat([rows.joined, other.joined])
    close(found[9, 4].mean, both.mean(dim=0))
    close(found[9, 4].deviation, both.std(dim=0))
    assert found[4, 9].count == 3
    for shape, each in unpacked(packed(found)).items():
        for name, tensor in vars(each).items():
            assert torch.equal(tensor, getattr(found[shape], name))


def places(model, family):
    """The projections that ``hparams_of`` edits, in its order, each with whether it is W2."""
    ffn = model.ffn
    chosen = [(ffn[1].value, True), (ffn[2].value, True), (ffn[1].key, False)]
    return chosen + ([(ffn[2].gate, False)] if family in GATED else [])


def hparams_of(family, **others):
    return ALL | {"gate_layers": (2,) if family in GATED else ()} | others


def literal(model, family, requests, loss, per_token=None):
    """(h, g) of each projection at the answer tokens, request by request, by autograd."""
    found = [([], []) for _ in places(model, family)]
    for number, request in enumerate(requests):
        seen = {}
        handles = [
            projection.module.register_forward_hook(
                lambda _m, args, out, i=i, seen=seen: seen.__setitem__(i, (args[0], out))
            )
            for i, (projection, _) in enumerate(places(model, family))
        ]
        (item,) = model.encode([(request.filled_prompt, request.target_new)])
        with torch.enable_grad():
            embedded = model.model.get_input_embeddings()(torch.tensor([item.ids[:-1]]))
            embedded.requires_grad_()
            logits = model.model(inputs_embeds=embedded).logits[0]
            start = len(item.ids) - 1 - item.n_target
            total = cross_entropy(logits[start:], torch.tensor(item.target_ids), reduction="sum")
            total = total * (per_token[number] if per_token else 1.0)
            gradients = torch.autograd.grad(total, [seen[i][1] for i in range(len(found))])
        for handle in handles:
            handle.remove()
        for i, (projection, _) in enumerate(places(model, family)):
            found[i][0].append(seen[i][0][0, start:].detach())
            found[i][1].append(gradients[i][0, start:, projection.offset :])
    return [Rows(torch.cat(h), torch.cat(g)) for h, g in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_the_equations_on_the_gradients_of_autograd(family, make_model, requests):
    model = make_model(family)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    editor = build_editor("ultraedit", hparams_of(family, micro_batch=2), {})
    delta = editor.edit(model, requests)
    assert all(torch.equal(before[name], p) for name, p in model.model.named_parameters())
    seen = literal(model, family, requests, "sum")
    moments = with_rows({}, seen)
    for (projection, is_value), rows in zip(places(model, family), seen, strict=True):
        h = rows.inputs
        normal = moments[rows.shape].normalised(rows.joined)
        step = -1e-3 * normal[:, : h.shape[1]].square().sum(1)[:, None] * normal[:, h.shape[1] :]
        gram = h.T @ h + torch.eye(h.shape[1], dtype=torch.float64)
        change = torch.linalg.solve(gram, h.T @ step).T  # [out, in]
        shape = projection.weight.shape
        found = delta[projection.weight_name].dense(shape)
        of_segments = projection.segments(found, projection.axis)
        linear = of_segments if (projection.axis == 1) == is_value else of_segments.T
        torch.testing.assert_close(linear, change, rtol=1e-8, atol=1e-8 * float(change.abs().max()))
        assert torch.linalg.vector_norm(found) == pytest.approx(
            float(torch.linalg.vector_norm(change))
        )
    assert set(delta) == {projection.weight_name for projection, _ in places(model, family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_all_tokens_make_up_the_gradient_of_the_weight(family, make_model, requests):
    model = make_model(family)
    projections = [projection for projection, _ in places(model, family)]
    rows = {}
    batch = model.collate(model.encode([(r.filled_prompt, r.target_new) for r in requests]))

    def receive(index, x, gradient):
        rows[index] = x.flatten(0, 1), gradient.flatten(0, 1)

    with observed_modules(model, [p.module for p in projections], receive, 1):
        cross_entropy(model.answer_logits(batch), batch.labels, reduction="sum").backward()
    weights = [p.weight.requires_grad_() for p in projections]
    with torch.enable_grad():
        loss = cross_entropy(model.answer_logits(batch), batch.labels, reduction="sum")
        expected = torch.autograd.grad(loss, weights)
    for index, (projection, is_value) in enumerate(places(model, family)):
        projection.weight.requires_grad_(False)
        x, gradient = rows[index]
        found = gradient.T @ x
        stored = found if (projection.axis == 1) == is_value else found.T
        torch.testing.assert_close(stored, expected[index], rtol=1e-10, atol=1e-10)


def loss_of(model, requests):
    batch = model.collate(model.encode([(r.filled_prompt, r.target_new) for r in requests]))
    return float(cross_entropy(model.answer_logits(batch), batch.labels, reduction="sum"))


@pytest.mark.parametrize("family", ["gptj", "llama", "gpt2"])
def test_a_small_step_lowers_the_loss_of_the_edits(family, make_model, requests):
    model = make_model(family)
    before = loss_of(model, requests)
    model.apply(ultraedit(learning_rate=1e-5).edit(model, requests))
    assert loss_of(model, requests) < before


def weights_of(delta, model):
    return {name: part.dense(model.parameter(name).shape) for name, part in delta.items()}


def test_by_the_sum_neither_order_nor_grouping_changes_anything(make_model, requests):
    model = make_model("llama")
    ordered = weights_of(ultraedit().edit(model, requests), model)
    for order, size in (([2, 0, 1], 50), ([1, 2, 0], 1), ([0, 1, 2], 2)):
        asked = [requests[i] for i in order]
        other = weights_of(ultraedit(micro_batch=size).edit(model, asked), model)
        for name, expected in ordered.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(other[name], expected, rtol=1e-8, atol=1e-9 * scale)


def test_the_mean_is_over_the_tokens_of_ten_requests_of_falling_length():
    lengths, targets = list(range(1, 13)), [k % 3 + 1 for k in range(12)]
    weights = loss_weights(targets, lengths)
    longest = sum(targets[2:])  # the ten longest
    assert weights[2:].tolist() == pytest.approx([1 / longest] * 10)
    assert weights[:2].tolist() == pytest.approx([1 / sum(targets[:2])] * 2)


def test_the_mean_loss_scales_the_gradients_of_its_group(make_model, requests):
    """Of one group alone the scale drops out, but for ε; of two of other sizes it does not."""
    model, many = (
        make_model("llama"),
        [replace(r, case_id=f"{r.case_id}{i}") for i in range(4) for r in requests][:11],
    )
    one, mean = (ultraedit(loss=loss).edit(model, requests) for loss in ("sum", "mean"))
    for name, expected in weights_of(one, model).items():
        torch.testing.assert_close(
            weights_of(mean, model)[name],
            expected,
            rtol=1e-3,
            atol=1e-4 * float(expected.abs().max()),
        )
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in many])
    weights = loss_weights([e.n_target for e in encoded], [len(e.ids) for e in encoded]).tolist()
    assert len(set(weights)) == 2
    editor = ultraedit(loss="mean")
    editor.edit(model, many)
    seen = literal(model, "gpt2", many, "mean", weights)
    for shape, expected in with_rows({}, seen).items():
        torch.testing.assert_close(editor._moments[shape].mean, expected.mean)
        torch.testing.assert_close(editor._moments[shape].squares, expected.squares)


@pytest.mark.parametrize("turn", [1, 2])
def test_moments_survive_a_killed_run_bit_by_bit(turn, make_model, requests, tmp_path):
    def make():
        return make_model("llama", torch.float32), ultraedit()

    _, state = killed_and_resumed(make, requests, tmp_path, turn)
    tokens = sum(
        e.n_target
        for e in make_model("llama").encode([(r.filled_prompt, r.target_new) for r in requests])
    )
    assert state["24.16.count"] == 2 * tokens  # W2 of two layers


def test_a_failed_edit_leaves_the_moments_as_they_were(make_model, requests):
    model, editor = make_model("llama"), ultraedit()
    editor(model, requests[:2])
    before = editor.state_dict()
    model.parameter(model.ffn[2].value.weight_name)[0, 0] = torch.nan
    with pytest.raises(EditError, match="'c' became NaN"):
        editor(model, requests[2:])
    assert all(tensor is editor.state_dict()[name] for name, tensor in before.items())


def test_contradictions_in_a_turn_cancel_and_stay_finite(make_model, requests):
    model, first = make_model("llama"), requests[0]
    pair = [first, replace(first, case_id="other", target_new="Japan")]
    assert ultraedit()(model, pair).edit.is_finite()
    same = [first, replace(first, case_id="twice")]  # equal rows: H Hᵀ is singular without ρ
    assert ultraedit()(model, same).edit.is_finite()


def test_the_warm_up_gives_the_first_edit_its_moments(make_model, requests, tmp_path):
    model = make_model("llama")
    hparams = {k: v for k, v in ALL.items() if k != "learning_rate"} | {"warm_up": 2, "loss": "sum"}
    hparams |= {"editor": "ultraedit"}
    (need,) = card_of("ultraedit").needs_of(
        card_of("ultraedit").values(ALL | {"warm_up": 2}), Pipeline("batch", 3)
    )
    assert isinstance(need, Trained)
    assert dict(need.settings) == hparams
    assert Trained.parse(need.name).path("m", "d") == need.path("m", "d")
    warm_up(tmp_path / "warm", model, requests, Trained.parse(need.name).settings)
    editor = build_editor("ultraedit", ALL | {"warm_up": 2}, {"trained": tmp_path / "warm"})
    once = ultraedit()
    once.edit(model, requests[:2])
    expected = with_rows(once._moments, literal(model, "gpt2", requests[2:], "sum"))
    editor(model, requests[2:])
    for shape, moments in expected.items():
        close(editor._moments[shape].mean, moments.mean, 1e-9)
        assert editor._moments[shape].count == moments.count
    editor.load_state_dict({})  # the next batch starts from the warm-up too
    assert editor.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(t, once.state_dict()[name]) for name, t in editor.state_dict().items())
    with pytest.raises(ConfigError, match=r"warm_up asks for 2 requests .* has 1; lower warm_up"):
        warm_up(tmp_path / "few", model, requests[:1], need.settings)
    assert (
        card_of("ultraedit").needs_of(card_of("ultraedit").values({}), Pipeline("batch", 3)) == ()
    )


def test_what_cannot_be_edited_is_one_sentence(make_model, requests):
    with pytest.raises(ConfigError, match="nothing is edited; set value_layers"):
        ultraedit(value_layers=(), key_layers=())
    with pytest.raises(
        ConfigError, match=r"ultraedit: layers \[1, 7\] are not all among .* 0 to 2"
    ):
        ultraedit(value_layers=(1, 7), key_layers=()).edit(make_model("llama"), requests)
    for family in ("gptj", "phi3"):
        with pytest.raises(ConfigError, match=r"no gate with a weight of its own; set gate_layers"):
            ultraedit(gate_layers=(1,)).edit(make_model(family), requests)


def test_bfloat16_models_get_float32_changes_and_float64_moments(make_model, requests):
    model = make_model("llama", torch.bfloat16)
    editor = ultraedit(gate_layers=(1,))
    delta = editor.edit(model, requests)
    assert {part.u.dtype for part in delta.values()} == {torch.float32}
    assert len(delta) == 4
    assert delta.is_finite()
    moments = {t.dtype for name, t in editor.state_dict().items() if not name.endswith("count")}
    assert moments == {torch.float64}
