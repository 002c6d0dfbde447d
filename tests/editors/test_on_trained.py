"""Every editor that optimises the new answer writes it over a fact that a trained model knows."""

import pytest
import torch

from kmebench.data.records import EditRequest, write_requests
from kmebench.editors.base import build_editor
from kmebench.editors.cards import registered
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import prompts_of

HPARAMS = {
    "pac": {"trace_on": "current", "learning_rate": 1e-3},
    "pac-released": {"learning_rate": 5e-3},
    "full-c": {"learning_rate": 1e-3, "norm_constraint": None},
    "ft-l": {"layer": 1, "learning_rate": 1e-3},
    "ft-m": {"layer": 1, "learning_rate": 1e-3},
    "locft-bf": {"layer": 1, "learning_rate": 3e-3},
    "lora": {},
    "lora-merge": {"learning_rate": 1e-2, "steps": 50, "merge_weight": 1.0},
    "grace": {"layer": 1, "radius": 0.5},
    "wise": {"layer": 1, "learning_rate": 5.0, "margins": [0.1, 1.0, 0.5]},
    "memoir": {"layer": 1, "mask_density": 0.03, "threshold": 0.9, "steps": 100},
}


def answer(model, request):
    settings = Settings(wild_max_tokens=1)  # what is said beyond is not read
    columns = predict(model, prompts_of(request, 0)[:1], settings, decode=True)
    return model.tokenizer.decode(columns["free_ids"][0]).strip()


# KN and UltraEdit move a fixed step towards the new answer, reached or not: kn/test_kn.py,
# gradient/test_ultraedit.py. MEND and MALMEN do what they were trained to: hyper/. Those that
# write at the subject's last token cannot reach this model's answers, which are read from the
# subject in its first layer already: locate/test_locate_and_edit.py, pac/test_npac.py. Nor does it
# learn from its context, as IKE and SERAC ask of a model: memory/test_text_memory.py.
# CrispEdit is LocFT-BF where the model's other text allows it: finetune/test_crispedit.py.
def test_every_other_editor_is_of_a_family_that_this_model_does_not_suit():
    unsuited = ("kn", "gradient", "hyper", "locate", "control")
    suited = {n for n, c in registered().items() if c.family not in unsuited}
    assert suited - {"npac", "ike", "serac", "crispedit"} == set(HPARAMS)


@pytest.mark.parametrize("name", HPARAMS)
@pytest.mark.parametrize("together", [1, 3])
def test_the_edited_model_says_the_new_answer_and_the_reverted_one_the_old(
    name, together, trained, capital_requests, tmp_path
):
    requests = capital_requests[:together]
    assert [answer(trained, r) for r in requests] == [r.target_true for r in requests]
    torch.manual_seed(0)  # LoRA's factors are drawn
    unrelated = EditRequest(
        "d", "Atlantis", "Where is {}?", "x", locality=(("Mount Fuji stands in", "y"),)
    )
    write_requests(tmp_path / "d.jsonl", [unrelated])
    editor = build_editor(name, HPARAMS[name], {"development": tmp_path / "d.jsonl"})
    trained.apply(editor.edit(trained, requests))
    after = [answer(trained, r) for r in requests]
    trained.revert()
    assert after == [r.target_new for r in requests]
    assert editor.steps > 0
    assert [answer(trained, r) for r in requests] == [r.target_true for r in requests]
