"""Overlays act on texts, module outputs and logits, in that order, wherever a model is asked."""

from dataclasses import dataclass

import pytest
import torch

from kmebench.edits import overlays
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Overlay, Text, check_beside, overlay_class
from kmebench.edits.weights import Rows, WeightDelta
from kmebench.errors import KMEBenchError, ModelError
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt
from kmebench.models.encoding import Encoded
from kmebench.pipelines.one_fact import next_token, says


@dataclass(frozen=True)
class Replacing(Overlay):
    """Asks about Italy instead of France, and makes one token certain in open rows."""

    token: int
    kind = "test-replacing"

    def rewrite(self, texts):
        return [t._replace(prompt=t.prompt.replace("France", "Italy")) for t in texts]

    def logits(self, passage, base, model):
        raised = base.clone()
        raised[:, self.token] += 100.0
        return raised

    def tensors(self):
        return {"token": torch.tensor(self.token)}

    @classmethod
    def from_tensors(cls, tensors):
        return cls(int(tensors["token"]))


@dataclass(frozen=True)
class Asking(Overlay):
    """Rewrites alone; whatever it says of targets, those of the question are scored."""

    kind = "test-asking"

    def rewrite(self, texts):
        return [Text(t.prompt.replace("France", "Italy")) for t in texts]

    def tensors(self):
        return {"nothing": torch.zeros(1)}

    @classmethod
    def from_tensors(cls, tensors):
        return cls()


FRANCE, ITALY = "The capital of France is", "The capital of Italy is"


def asked(model, prompt):
    prompts = [Prompt("x", 0, "edit", prompt, "Rome", "Rome", "Paris")]
    columns = predict(model, prompts, Settings(8, 3), decode=True)
    return {name: values for name, values in columns.items() if name != "target_ids"}


def test_what_is_rewritten_is_asked_everywhere(make_model):
    model = make_model("llama")
    plain = asked(model, ITALY), next_token(model, ITALY), says(model, ITALY, 3)
    model.apply(Edit(overlays={"a": Asking()}))
    rewritten = asked(model, FRANCE)
    # The question-answer prompt of the wild protocol holds the prompt; it is rewritten too.
    assert rewritten == plain[0]
    assert torch.equal(next_token(model, FRANCE), plain[1])
    assert says(model, FRANCE, 3) == plain[2]
    model.revert()
    assert asked(model, FRANCE) != rewritten


def test_logits_are_changed_in_scoring_and_in_every_step_of_decoding(make_model):
    model = make_model("gptj")
    (token, *_) = model.tokenizer("Japan", add_special_tokens=False)["input_ids"]
    model.apply(Edit(overlays={"r": Replacing(token)}))
    found = asked(model, FRANCE)
    assert set(found["ids"][0]) == {token}
    assert set(found["free_ids"][0]) == {token}
    assert float(next_token(model, FRANCE)[token]) == pytest.approx(1.0)
    assert model.generate(model.encode_prompts([FRANCE, "Mount"]), 3).tolist() == [[token] * 3] * 2


def test_an_edit_of_weights_and_overlays_reads_back(make_model, tmp_path):
    edit = Edit(
        WeightDelta({"w": Rows(torch.tensor([1]), torch.ones(1, 3))}),
        {"r": Replacing(7), "a": Asking()},
    )
    edit.save(tmp_path / "e.safetensors")
    loaded = Edit.load(tmp_path / "e.safetensors")
    assert dict(loaded.overlays) == dict(edit.overlays)
    assert torch.equal(loaded.weights["w"].values, torch.ones(1, 3))
    (tmp_path / "f.safetensors").write_bytes(b"x")
    edit.save(tmp_path / "f.safetensors")
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "f.safetensors").read_bytes()


def test_a_later_overlay_replaces_an_earlier_one_of_its_name():
    total = Edit(overlays={"a": Asking(), "r": Replacing(1)}) + Edit(overlays={"r": Replacing(2)})
    assert dict(total.overlays) == {"a": Asking(), "r": Replacing(2)}
    assert not Edit()
    assert total


def test_an_overlay_of_an_unknown_kind_is_a_sentence(tmp_path, monkeypatch):
    Edit(overlays={"a": Asking()}).save(tmp_path / "e.safetensors")
    monkeypatch.delitem(overlays._CLASSES, "test-asking")
    with pytest.raises(KMEBenchError, match=r"No installed package knows .* 'test-asking'"):
        Edit.load(tmp_path / "e.safetensors")


def test_an_installed_package_brings_overlays(monkeypatch):
    class Point:
        @staticmethod
        def load():
            overlays._CLASSES["test-brought"] = Asking

    monkeypatch.setattr(overlays, "entry_points", lambda group, name: [Point])
    assert overlay_class("test-brought") is Asking
    monkeypatch.delitem(overlays._CLASSES, "test-brought")


def test_without_overlays_nothing_is_registered(make_model, monkeypatch):
    model = make_model("llama")
    batch = model.collate([Encoded((1, 2, 3), n_target=1)])

    def refused(*_args, **_kwargs):
        raise AssertionError("a hook without an overlay")

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", refused)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", refused)
    model.answer_logits(batch)
    assert model.rewritten([Text("x")]) == [Text("x")]


def test_an_overlay_beside_a_module_needs_one_of_its_width(make_model):
    model = make_model("llama")
    module = model.ffn[1].value
    name, (outputs, inputs) = module.weight_name.removesuffix(".weight"), module.weight.shape
    check_beside(model, name, (outputs, inputs), "a memory")
    check_beside(model, name, (inputs, outputs), "a memory")  # as Conv1D stores it
    for asked, shape in ((name, (outputs, inputs + 1)), (f"{name}x", (outputs, inputs))):
        with pytest.raises(ModelError, match=f"a memory beside '{asked}' .* this model lacks"):
            check_beside(model, asked, shape, "a memory")
