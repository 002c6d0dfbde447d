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
from kmebench.editors.memory.context_editor import ContextEditor
from kmebench.edits.contexts import Contexts, Fact
from kmebench.errors import EditError


class IKE(ContextEditor):
    """Facts behind demonstrations."""

    hparams: IKEHparams

    def empty(self) -> Contexts:
        """Return a memory without facts; see :meth:`ContextEditor.empty`."""
        return Contexts(self.hparams.scope, self.hparams.threshold, self.encoder)

    def key(self, request: EditRequest) -> str:
        """Return the prompt alone: with the answer, questions are less like their own facts."""
        return request.filled_prompt

    def contexts(self, requests: Sequence[EditRequest], earlier: Sequence[Fact]) -> list[str]:
        """Return demonstrations, the fact as a block, and how a question about it begins."""
        edited = {(fact.case_id, fact.subject, fact.prompt) for fact in earlier}
        edited |= {_identity(request) for request in requests}
        shown = self._shown(requests, edited)
        return [_context(request, blocks) for request, blocks in zip(requests, shown, strict=True)]

    def _shown(
        self, requests: Sequence[EditRequest], edited: set[tuple[str, str, str]]
    ) -> list[list[str]]:
        """Return the demonstration blocks of each request, the nearest record first."""
        k = self.hparams.demonstrations
        if not k:
            return [[] for _ in requests]
        records, keys = self._records
        values = [set(each) for each in zip(*edited, strict=True)]  # cases, subjects, prompts
        usable = [
            place
            for place, record in enumerate(records)
            if not any(x in known for x, known in zip(_identity(record), values, strict=True))
        ]
        if len(usable) < k:
            raise EditError(
                f"{self.name}: {len(usable)} development records can be shown (with a paraphrase "
                f"and a locality prompt, and not of an edited fact), fewer than {k}; raise the "
                "data set's development, or lower demonstrations."
            )
        queries = self.encoder.embed([f"{_fact(r)}\nPrompt: {r.filled_prompt}" for r in requests])
        ranked = (queries @ keys[usable].T).argsort(dim=1, descending=True, stable=True)[:, :k]
        return [
            self._blocks(request, [records[usable[i]] for i in row])
            for request, row in zip(requests, ranked.tolist(), strict=True)
        ]

    def _blocks(self, request: EditRequest, records: Sequence[EditRequest]) -> list[str]:
        """Show each record in one kind: copy, update and retain as 1 to 3 to 4, at random.

        What is random depends on the seed and on the request, not on the edits before it.
        """
        dice = random.Random(f"{torch.initial_seed()} {request.case_id}")
        eighth = len(records) / 8
        copies, updates = int(eighth), int(3 * eighth)
        kinds = ["copy"] * copies + ["update"] * updates
        kinds += ["retain"] * (len(records) - len(kinds))
        dice.shuffle(kinds)
        return [_block(*pair, dice) for pair in zip(records, kinds, strict=True)]

    @cached_property
    def _records(self) -> tuple[list[EditRequest], Tensor]:
        """The development records that show all kinds, and the embeddings of their copy blocks."""
        records = read_requests(self.assets["development"])
        records = [record for record in records if record.paraphrases and record.locality]
        blocks = [f"{_fact(r)}\nPrompt: {r.filled_prompt} {r.target_new}" for r in records]
        return records, self.encoder.embed(blocks) if records else torch.empty(0)


def _identity(request: EditRequest) -> tuple[str, str, str]:
    return request.case_id, request.subject, request.filled_prompt


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
