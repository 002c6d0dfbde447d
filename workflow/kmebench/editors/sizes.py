"""What a job holds in memory, from the shape of a model and an editor's values. No torch.

Each card says what its editor holds beside the weights (``Card.holds``), in terms of the matrices,
activations and logits of a :class:`Job`. ``benchmarks/memory.py`` measures all of them.
"""

from dataclasses import dataclass
from typing import Any

#: Bytes of numbers that are computed with: masters, gradients and moments; factors of C.
_SINGLE, _DOUBLE = 4, 8
#: Tokens of a prompt with its target, and of those from the subject's last one on.
PROMPT, SUFFIX = 16, 10
#: Texts of which the loss of MEMIT's target is made: contexts, the bare prompt, that of the KL.
MEMIT_TEXTS = 7
#: Neutral text of the metric: texts in one pass, tokens of each, layers whose moments are summed.
METRIC_ROWS, METRIC_LENGTH, METRIC_LAYERS = 4, 128, 8
#: Copies of the logits at one place: themselves, their softmax, and its gradient.
_LOGITS = 3


@dataclass(frozen=True)
class Job:
    """A model and how it is edited: ``requests`` together, of the ``edits`` of a run."""

    layers: int
    width: int  # D
    ffn_width: int  # M
    parameters: float
    requests: int
    edits: int
    consecutive: bool
    weight_bytes: int = 4  # of one, as it is stored

    @property
    def remembered(self) -> int:
        """Requests that an editor with a memory holds at most: batches start without one."""
        return self.edits if self.consecutive else self.requests

    @property
    def matrix(self) -> float:
        """Bytes of W1 or W2 of one layer, in float32."""
        return _SINGLE * self.width * self.ffn_width

    @property
    def gated(self) -> bool:
        """Whether a third matrix gates the FFN, as far as the shape tells.

        Families without one have M = 4 D. So do a few with one (Llama 3.2 1B, Gemma 2 2B): there
        more is asked for than is needed.
        """
        return self.ffn_width != 4 * self.width

    @property
    def factor(self) -> float:
        """Bytes of the inverse or the spectrum of the covariance of one layer."""
        return _DOUBLE * self.ffn_width**2

    @property
    def embedding(self) -> float:
        """Bytes of the embedding of all tokens, in float32: what layers do not explain."""
        layer = (2 + self.gated) * self.width * self.ffn_width + 3 * self.width**2
        return _SINGLE * max(self.parameters - self.layers * layer, 0.05 * self.parameters)

    def graph(self, texts: float, layers: float | None = None, tokens: float = PROMPT) -> float:
        """Bytes that a backward pass through ``layers`` (all) needs of texts, with their logits.

        Two places with logits each. Of a layer about 8 D numbers a token, and 3 M.
        """
        depth = self.layers if layers is None else layers
        states = depth * (8 * self.width + 3 * self.ffn_width) * _SINGLE
        return texts * (tokens * states + 2 * self.logits)

    @property
    def logits(self) -> float:
        """Bytes of the logits at one place, with what a loss makes of them."""
        return _LOGITS * self.embedding / self.width

    def network(self, rank: int, shapes: int) -> float:
        """Bytes of the hyper-networks of some shapes: two blocks, each of two maps of a rank."""
        rows = self.width + self.ffn_width
        return _SINGLE * shapes * 2 * 2 * rows * min(rank, rows)

    def ledger(self, matrices: float) -> float:
        """Bytes of what matrices were and of their masters, and of their total at a run's end."""
        return (3 if self.consecutive else 2) * matrices * self.matrix


def as_much_again(hparams: Any, job: Job) -> float:
    """Hold the weights once more: for an editor of whom nothing is known."""
    return _SINGLE * job.parameters


def target_graph(job: Job, requests: int, layer: int) -> float:
    """Return the bytes of the graph of the targets of some requests, above ``layer``."""
    return job.graph(MEMIT_TEXTS * requests, job.layers - layer, SUFFIX)
