"""KN: knowledge neurons (Dai et al. 2022, "Knowledge neurons in pretrained transformers").

The neurons that carry a fact are found by integrated gradients of the probability of the answer
to be forgotten (:mod:`kmebench.editors.kn.attribution`): those above a share of the largest
attribution in enough of n prompts, the edit prompt behind sampled texts (section 3.3). The
value v_j of each, a segment of W2, is then moved from the old answer to the new one,

    v_j ← v_j − 2 e(y_old) + 2 e(y_new)

with e the input embedding. Both answers stand for by their *first token*. y_old is the
request's ``target_true``, or the model's own argmax where a request names none.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Assets
from kmebench.editors.contexts import Contexts, InContexts, prefixes
from kmebench.editors.kn.attribution import attribute
from kmebench.editors.kn.cards import KNHparams
from kmebench.edits.weights import Columns, Part, Rows, WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.precision import promoted

logger = logging.getLogger("kmebench")

#: Tokens of the texts that stand before the prompt.
CONTEXT_TOKENS = 10


class KN(InContexts):
    """Moves the values of a fact's neurons; no optimisation."""

    hparams: KNHparams

    def __init__(self, hparams: KNHparams, assets: Assets) -> None:
        super().__init__(hparams, assets)
        self.lengths = ((CONTEXT_TOKENS, hparams.prompts - 1),)

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests``, each on the model as it is given; see :meth:`Editor.edit`.

        The contexts are sampled from the model of the first call after a fresh start, which in
        every pipeline is the original one. A request without any neuron changes nothing.
        """
        with self.stopwatch("trace"):
            contexts = self.contexts(model)
            edits = (self._edit_one(model, request, contexts) for request in requests)
            return sum(edits, WeightDelta({}))

    def _edit_one(
        self, model: EditableModel, request: EditRequest, contexts: Contexts
    ) -> WeightDelta:
        old, new = _answers(model, request)
        prompts = [before + request.filled_prompt for before in prefixes(contexts)]
        attributions = [
            attribute(
                model,
                item.ids[: -item.n_target],
                old,
                steps=self.hparams.steps,
                micro_batch=self.micro_batch,
            )
            for item in model.encode([(prompt, request.target_new) for prompt in prompts])
        ]
        self.steps += len(prompts) * self.hparams.steps
        neurons = knowledge_neurons(
            torch.stack(attributions), self.hparams.threshold, self.hparams.share
        )
        logger.info("%s: request %r has %d neurons", self.name, request.case_id, int(neurons.sum()))
        return _delta(model, neurons, old, new, self.hparams.scale)


def knowledge_neurons(attributions: Tensor, threshold: float, share: float) -> Tensor:
    """Return which neurons carry a fact, bool [L, M], from attributions [n, L, M].

    Coarse, per prompt: above ``threshold`` times the largest of all layers. Refined: in more than
    ``share`` of the n prompts. Where no attribution is positive there is none.
    """
    coarse = attributions > threshold * attributions.amax(dim=(1, 2), keepdim=True)
    # In floating point 0.29 * 100 is a little below 29.
    return coarse.sum(dim=0) > math.floor(share * len(attributions) + 1e-9)


def _answers(model: EditableModel, request: EditRequest) -> tuple[int, int]:
    """Return the first tokens of the answers to be forgotten and to be learnt."""
    prompt = request.filled_prompt
    (new,) = model.encode([(prompt, request.target_new)])
    if request.target_true is not None:
        (old,) = model.encode([(prompt, request.target_true)])
        return old.target_ids[0], new.target_ids[0]
    with torch.no_grad():
        logits = model.answer_logits(model.collate([new]))
    return int(logits[0].argmax()), new.target_ids[0]


def _delta(model: EditableModel, neurons: Tensor, old: int, new: int, scale: float) -> WeightDelta:
    embedding = model.model.get_input_embeddings().weight
    dtype = promoted(embedding.dtype)
    change = scale * (embedding[new].to(dtype) - embedding[old].to(dtype))  # [D]
    parts: dict[str, Part] = {}
    for ffn, chosen in zip(model.ffn, neurons, strict=True):
        index = chosen.nonzero().squeeze(1)
        if len(index):
            kind = Rows if ffn.value.axis == 0 else Columns
            index = index.to(ffn.value.weight.device)
            values = change.to(index.device).expand(len(index), -1).clone()
            parts[ffn.value.weight_name] = kind(index, values)
    return WeightDelta(parts)
