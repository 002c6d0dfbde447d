"""What jobs ask for, against what was measured on real models and the terms written out."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from kmebench.editors.cards import card_of, registered
from kmebench.editors.contexts import MEMIT_LENGTHS, ROME_LENGTHS
from kmebench.editors.locate.cards import ROME_TEXTS
from kmebench.editors.locate.targets import TargetSettings
from kmebench.editors.sizes import MEMIT_TEXTS, Job
from kmebench.planning import grid, memory
from kmebench.planning.config import read_checked_config

CONFIG = read_checked_config(Path("config.yaml"))
QWEN_05B = {"layers": 24, "width": 896, "ffn_width": 4864, "parameters": 630_167_424}
QWEN_15B = {"layers": 28, "width": 1536, "ffn_width": 8960, "parameters": 1_543_714_304}


def asked(shape, method, requests, dtype="float32"):
    """GB that a run on a model of this shape asks for."""
    return _asked(shape, method, requests, "batch" if requests > 1 else "consecutive", dtype)


def consecutive(shape, method, edits):
    """GB that a run of edits one after another asks for."""
    return _asked(shape, method, edits, "consecutive", "float32")


def _asked(shape, method, requests, mode, dtype):
    config = copy.deepcopy(CONFIG)
    config["models"] = {"m": {"shape": shape, "dtype": dtype}}
    config["datasets"]["openfacts-zsre"]["n"] = requests
    run = grid.Run("m", "openfacts-zsre", mode, method, "default", 0)
    return memory.asked_by_run(config, run) / 1e9


def test_full_fine_tuning_asks_for_what_it_took():
    """W, and of the FFN where it starts, W0, gradients and two moments: 22 GB were measured."""
    trained = 4 * 28 * 2 * 1536 * 8960 / 1e9
    at_least = 4 * QWEN_15B["parameters"] / 1e9 + 5 * trained
    assert at_least == pytest.approx(21.6, abs=0.1)
    assert at_least < asked(QWEN_15B, "full-c", 1) < 1.2 * at_least


def test_one_edit_by_pac_asks_for_little_more_than_the_weights():
    weights = 4 * QWEN_15B["parameters"] / 1e9
    assert weights < asked(QWEN_15B, "pac", 1) < 1.3 * weights


def test_what_earlier_edits_by_pac_touched_is_held():
    """Up to all of the FFN: original, master and total, while only few segments are trained."""
    ffn = 4 * 24 * 2 * 896 * 4864 / 1e9
    one, some, all_ = (consecutive(QWEN_05B, "pac", n) for n in (1, 101, 10_000))
    assert some - one == pytest.approx(3 * ffn * 100 * (15 + 1) / 4864)
    assert all_ - one == pytest.approx(3 * ffn * (1 - (15 + 1) / 4864))


def test_a_turn_holds_what_a_batch_does_and_the_edits_before_it():
    one, turn, batch = (
        _asked(QWEN_05B, "full-c", 20, mode, "float32")
        for mode in ("consecutive", "consecutive+turn=20", "batch")
    )
    assert one < turn > batch
    assert turn == _asked(QWEN_05B, "full-c", 20, "consecutive+turn=50", "float32")


def test_factors_of_the_covariance_are_counted_by_layer():
    """C⁻¹ of five layers in float64 against that of one."""
    job = Job(**QWEN_15B, requests=1, edits=1, consecutive=True)
    five, one = (card_of("memit").values({"layers": layers}) for layers in ([4, 5, 6, 7, 8], [8]))
    more = card_of("memit").holds(five, job) - card_of("memit").holds(one, job)
    assert more == pytest.approx(4 * (8 * 8960**2 + 3 * 4 * 1536 * 8960))


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        # Of five layers, and of one again: keys in float32 and float64, a factor in float64.
        ("alphaedit", lambda n: 6 * ((4 + 8) * 8960 * n + 8 * n**2)),
        ("grace", lambda n: 3 * 4 * (1536 + 8960) * n),
    ],
)
def test_what_is_remembered_of_every_edit_is_counted(method, numbers):
    card = card_of(method)
    values = card.values({"layers": [4, 5, 6, 7, 8]} if method == "alphaedit" else {})
    few, many = (Job(**QWEN_15B, requests=1, edits=n, consecutive=True) for n in (1, 10_000))
    more = card.holds(values, many) - card.holds(values, few)
    assert more == pytest.approx(numbers(10_000) - numbers(1))
    batches = replace(many, consecutive=False)
    assert card.holds(values, batches) < card.holds(values, few) + 1e9


def test_narrow_weights_are_trained_as_float32_masters_beside_them():
    """Start, masters, gradient, two moments; the original weights in their own bytes."""
    job = Job(**QWEN_15B, requests=1, edits=1, consecutive=True)
    values = card_of("ft-m").values({})
    wide, narrow = (card_of("ft-m").holds(values, replace(job, weight_bytes=b)) for b in (4, 2))
    assert narrow - wide == pytest.approx(0.5 * 4 * 1536 * 8960)


@pytest.mark.parametrize("name", registered())
def test_more_requests_never_hold_less_and_half_the_bytes_ask_for_less(name):
    method = next(m for m in CONFIG["methods"] if grid.editor_of(CONFIG, m) == name)
    assert asked(QWEN_05B, method, 4) <= asked(QWEN_05B, method, 20)
    halved = asked(QWEN_05B, method, 4) - asked(QWEN_05B, method, 4, "bfloat16")
    assert halved <= 2 * QWEN_05B["parameters"] / 1e9 + 1e-9
    assert halved > 0


def test_a_model_without_a_shape_asks_for_one_of_half_a_billion():
    config = copy.deepcopy(CONFIG)
    config["models"] = {"m": {"dtype": "float32"}}
    assert 2e9 < memory.asked_by_model(config, "m") < 4e9


def test_what_is_counted_without_torch_is_what_the_editors_do():
    for lengths, texts in ((MEMIT_LENGTHS, MEMIT_TEXTS), (ROME_LENGTHS, ROME_TEXTS)):
        assert texts == sum(n for _, n in lengths) + len(("bare prompt", "KL"))
    assert TargetSettings.micro_batch == memory.STAGE
