"""IKE (Zheng et al. 2023, "Can we edit factual knowledge by in-context learning?").

Every question about a fact is asked behind k demonstrations of how new facts do and do not change
answers, and the fact itself. Demonstrations are records of the development split; they are shown
in blocks of two lines, the nearest to the fact last. Without any (k = 0) this is ICE.
"""

import random
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kmebench.data.records import EditRequest, read_requests
from kmebench.editors.memory.cards import IKEHparams
from kmebench.editors.memory.development import alike
from kmebench.editors.memory.text_editor import TextEditor
from kmebench.edits.text_memory import TextMemory
from kmebench.errors import EditError


class IKE(TextEditor):
    """Facts behind demonstrations."""

    hparams: IKEHparams

    def empty(self) -> TextMemory:
        """Return a memory without facts; see :meth:`TextEditor.empty`."""
        return TextMemory(self.hparams.scope, self.hparams.threshold, self.encoder)

    def key(self, request: EditRequest) -> str:
        """Return the prompt alone: with the answer, questions are less like their own facts."""
        return request.filled_prompt

    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """Return demonstrations, the fact as a block, and how a question about it begins."""
        if not self.hparams.demonstrations:
            return [_context(request, []) for request in requests]
        queries = self.encoder.embed([f"{_fact(r)}\nPrompt: {r.filled_prompt}" for r in requests])
        return [
            _context(request, self._blocks(request, self._nearest(request, query)))
            for request, query in zip(requests, queries, strict=True)
        ]

    def _nearest(self, request: EditRequest, query: Tensor) -> list[EditRequest]:
        """Return the k development records nearest to a request, the nearest first.

        None shares case, subject or prompt with it.

        Raises:
            EditError: there are fewer.
        """
        (records, keys), k = self._records, self.hparams.demonstrations
        ranked = (keys @ query).argsort(descending=True, stable=True).tolist()
        usable = [records[i] for i in ranked if not alike(records[i], request)]
        if len(usable) < k:
            raise EditError(
                f"{self.name}: {len(usable)} development records with a paraphrase and a locality "
                f"prompt can be shown for the request {request.case_id!r}, fewer than {k}; raise "
                "development of the data set, or lower demonstrations."
            )
        return usable[:k]

    def _blocks(self, request: EditRequest, records: Sequence[EditRequest]) -> list[str]:
        """Show each record in one kind: copy, update and retain as 1 to 3 to 4, at random.

        What is random depends on the seed and on the request, not on the edits before it.
        """
        dice = random.Random(f"{torch.initial_seed()} {request.case_id}")
        k = len(records)
        copies, changed = (k + 4) // 8, (k + 1) // 2  # an eighth and a half, rounded
        kinds = ["copy"] * copies + ["update"] * (changed - copies) + ["retain"] * (k - changed)
        dice.shuffle(kinds)
        return [_block(*pair, dice) for pair in zip(records, kinds, strict=True)]

    @cached_property
    def _records(self) -> tuple[list[EditRequest], Tensor]:
        """The development records that show all kinds, and the embeddings of their copy blocks."""
        records = read_requests(self.assets["development"])
        records = [record for record in records if record.paraphrases and record.locality]
        blocks = [f"{_fact(r)}\nPrompt: {r.filled_prompt} {r.target_new}" for r in records]
        return records, self.encoder.embed(blocks)


def _context(request: EditRequest, blocks: Sequence[str]) -> str:
    own = f"{_fact(request)}\nPrompt: {request.filled_prompt} {request.target_new}\n\n"
    return "".join([*reversed(blocks), own, f"{_fact(request)}\nPrompt: "])


def _fact(request: EditRequest) -> str:
    return f"New Fact: {request.filled_prompt} {request.target_new}"


def _block(record: EditRequest, kind: str, dice: random.Random) -> str:
    """Return a record as a block: what it says of its prompt, a paraphrase or a neighbour."""
    asked = {
        "copy": [(record.filled_prompt, record.target_new)],
        "update": [(paraphrase, record.target_new) for paraphrase in record.paraphrases],
        "retain": record.locality,
    }
    question, answer = dice.choice(asked[kind])
    return f"{_fact(record)}\nPrompt: {question} {answer}\n\n"
