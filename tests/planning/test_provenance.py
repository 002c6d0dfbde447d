"""Where each value of a run comes from."""

from pathlib import Path

import pytest

from kmebench.errors import ConfigError
from kmebench.planning import grid, provenance
from kmebench.planning.by_hand import Kind, Source, method_of
from kmebench.planning.config import read_checked_config, read_files

BASE = Path("config.yaml")


def explained(overlays, cell):
    """Name -> (value, source, key)."""
    config, files = read_checked_config(BASE, overlays), read_files(BASE, overlays)
    rows = provenance.values_of(config, files, *provenance.cell_of(config, cell))
    return {row.name: (row.value, row.source, row.key) for row in rows}


def test_a_value_comes_from_the_last_file_at_the_most_special_place(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(
        "seed: 4\nmethods:\n  lora: {hparams: &shared {steps: 7}}\n"
        "  pac: {hparams: {<<: *shared, paths: 9, batch: {steps: 8}}}\n"
    )
    two.write_text("methods: {pac: {hparams: {paths: 3}}}\nevaluation: {wild_max_tokens: 5}\n")
    batch = explained([one, two], "smollm2-135m/pac/batch")
    assert batch["steps"] == (8, str(one), "methods.pac.hparams.batch.steps")
    assert batch["paths"] == (3, str(two), "methods.pac.hparams.paths")
    tuned = "config/tuned/tune-pac-batch.yaml"
    key = "models.smollm2-135m.hparams.pac.batch.learning_rate"
    assert batch["learning_rate"] == (0.0006, tuned, key)
    assert batch["lambda"] == (0.1, "default of the editor pac", "")
    assert batch["seed"] == (4, str(one), "seed")
    assert batch["evaluation.wild_max_tokens"][:2] == (5, str(two))
    assert batch["evaluation.batch_size"][:2] == (32, "config.yaml")
    assert batch["on_failed_edit"] == ("error", "default of the workflow", "")
    consecutive = explained([one, two], "smollm2-135m/pac/consecutive")
    assert consecutive["steps"] == (7, str(one), "methods.pac.hparams.steps")
    assert consecutive["learning_rate"][1] == "config/tuned/smollm2-135m.pac.yaml"


def test_a_value_may_have_its_name_in_python_at_any_place(tmp_path):
    """``lambda`` is ``contrast`` in Python; the more special place decides, not the name."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "methods: {pac: {hparams: {lambda: 0.2}}}\n"
        "models: {tiny-gptj: {hparams: {pac: {batch: {contrast: 0.3}}}}}\n"
    )
    batch = explained([overlay], "tiny-gptj/pac/batch")["lambda"]
    assert batch == (0.3, str(overlay), "models.tiny-gptj.hparams.pac.batch.contrast")
    assert explained([overlay], "tiny-gptj/pac/consecutive")["lambda"][0] == 0.2
    config = read_checked_config(BASE, [overlay])
    assert grid.variant_name(config, "tiny-gptj", "pac", "batch", {"contrast": 0.3}) == "default"
    run = grid.Run("tiny-gptj", "openfacts-zsre", "batch", "pac", "contrast=0.4", 0)
    assert grid.values_of(config, run).contrast == 0.4
    source = Source("tiny-gptj", Kind.CONFIG, config)
    assert method_of(source, "pac", {"contrast": 0.5}, "batch").hparams["lambda"] == 0.5


def test_the_device_of_a_model_goes_before_the_general_one(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("models: {tiny-gptj: {device: cpu}}\n")
    found = explained([overlay], "tiny-gptj/rome/batch")
    assert found["models.tiny-gptj.device"][:2] == ("cpu", str(overlay))
    assert "device" not in found


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("tiny-gptj/pac", "not of the form MODEL/METHOD/MODE"),
        ("tiny-gtpj/pac/batch", "did you mean 'tiny-gptj'"),
        ("tiny-gptj/memmit/batch", "did you mean 'memit'"),
        ("tiny-gptj/memit/batched", "did you mean 'batch'"),
    ],
)
def test_what_is_not_there_is_one_sentence(cell, complaint):
    with pytest.raises(ConfigError, match=complaint):
        explained([], cell)
