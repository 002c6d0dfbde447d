"""Questions behind a context that is read once: asked with all of their text is the oracle."""

from dataclasses import dataclass

import pytest
import torch

from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Overlay
from kmebench.evaluation import behind
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt
from kmebench.models.editable import EditableModel
from tests.conftest import FAMILIES

CONTEXT = "Mount Fuji stands in Japan, and the Seine flows through Paris. New Fact: "
ROOMY = {"gptj": "n_positions", "gpt2": "n_positions"}


@dataclass(frozen=True)
class Before(Overlay):
    """Puts a text before every prompt that does not begin with "Mount"."""

    context: str
    kind = "test-before"

    def rewrite(self, texts):
        return [
            text
            if text.prompt.startswith("Mount")
            else text._replace(prompt=self.context + text.prompt, context=self.context)
            for text in texts
        ]

    def tensors(self):
        return {"nothing": torch.zeros(1)}

    @classmethod
    def from_tensors(cls, tensors):
        return cls("")


class Hooking(Before):
    """The same, with a hook that changes nothing."""

    kind = "test-hooking"

    def hooks(self, passage):
        return {}


PROMPTS = [
    Prompt("a", 0, "edit", "The capital of France is", "Rome", "Rome", "Paris"),
    Prompt("a", 0, "paraphrase", "France, whose capital is", "the Paris of Italy", "Rome", "Paris"),
    Prompt("a", 0, "locality", "The Seine flows through", "of the Paris", "Rome", "Japan"),
    Prompt("b", 1, "locality", "Mount Fuji stands in", "Japan", "Rome", "Japan"),
]


def asked(model, decode=True):
    return predict(model, PROMPTS, Settings(8, 5), decode=decode)


def tokens_read(monkeypatch):
    """Count the tokens that pass through the model's layers."""
    count = []
    original = EditableModel.final_states

    def counting(self, batch, prefix=None):
        count.append(batch.input_ids.numel())
        return original(self, batch, prefix)

    monkeypatch.setattr(EditableModel, "final_states", counting)
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_context_changes_no_prediction(family, make_model, monkeypatch):
    room = {ROOMY.get(family, "max_position_embeddings"): 192}
    model = make_model(family, **room)
    model.apply(Edit(overlays={"b": Before(CONTEXT)}))
    read = []
    original = EditableModel.read
    monkeypatch.setattr(
        EditableModel, "read", lambda self, ids: read.append(ids) or original(self, ids)
    )
    shared = asked(model)
    assert len(read) == 3  # for targets, for free decoding, in the WILD manner
    monkeypatch.setattr(EditableModel, "shares_prefixes", False)
    plain = asked(model)
    for name in ("target_new_logprob", "target_true_logprob"):
        torch.testing.assert_close(
            torch.tensor(shared.pop(name)), torch.tensor(plain.pop(name)), rtol=0, atol=1e-10
        )
    assert shared == plain


def test_a_context_is_read_once(make_model, monkeypatch):
    model = make_model("llama", max_position_embeddings=192)
    model.apply(Edit(overlays={"b": Before(CONTEXT)}))
    few = tokens_read(monkeypatch)
    asked(model, decode=False)
    shared = sum(few)
    few.clear()
    monkeypatch.setattr(EditableModel, "shares_prefixes", False)
    asked(model, decode=False)
    (length,) = map(len, model.encode_prompts([CONTEXT.strip()]))
    assert sum(few) - shared > 2 * length


def test_where_a_hook_acts_questions_are_asked_whole(make_model, monkeypatch):
    model = make_model("llama", max_position_embeddings=192)
    model.apply(Edit(overlays={"b": Hooking(CONTEXT)}))
    monkeypatch.setattr(EditableModel, "read", None)
    asked(model)


def test_a_question_alone_behind_its_context_is_asked_whole(make_model, monkeypatch):
    model = make_model("llama", max_position_embeddings=192)
    model.apply(Edit(overlays={"b": Before(CONTEXT)}))
    monkeypatch.setattr(EditableModel, "read", None)
    alone = Prompt("a", 0, "edit", "The capital of France is", "Rome", "Rome", None)
    predict(model, [alone], Settings(8, 5), decode=True)


@pytest.mark.parametrize(
    ("prompts", "begin"),
    [
        ([(1, 2, 3, 4), (1, 2, 5)], (1, 2)),
        ([(1, 2, 3), (1, 2, 3, 4)], (1, 2)),  # each keeps a token of its own
        ([(1, 2, 3), (1, 2, 3)], (1, 2)),
        ([(1,), (1, 2)], ()),
        ([(1, 2), (3, 4)], ()),
    ],
)
def test_what_prompts_begin_with(prompts, begin):
    assert behind._begin(prompts) == begin
