"""What is measured: protocols decide what is right, and one table lists every metric.

Tables, figures, scores, findings and notebooks read :data:`METRICS`; a new metric is one entry.
No model, no torch.

A metric with ``per="request"`` is scored on stored predictions, prompt by prompt, by one of the
:data:`PROTOCOLS`. Efficacy, Generality and Portability ask for the target on edit, paraphrase
and portability prompts. Locality asks for the unedited model's answer on unrelated prompts.
Score is the mean of Efficacy, Generality and Locality. A metric with ``per="state"`` is a number
about a model after so many edits (:mod:`kmebench.evaluation.health`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from kmebench.evaluation.answers import begins_with, normalise

#: One prompt's predictions, or one state's measurements.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Protocol:
    """A way to decide whether a prediction is right: 1 right, 0 wrong, NaN where it cannot say.

    ``reads`` is the column that is empty where the protocol was not run.
    """

    name: str
    reads: str
    says_target: Callable[[Row], float]
    unchanged: Callable[[Row], float]  # whether it says what the unedited model said


def _token_share(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(wanted)))


def _all_equal(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    return float(list(predicted) == list(wanted))


def _preferred(row: Row, first: str, second: str) -> float:
    a, b = (row[f"target_{target}_logprob_after"] for target in (first, second))
    return float("nan") if np.isnan(a) or np.isnan(b) or _are_one(row) else float(a > b)


def _are_one(row: Row) -> bool:
    """Whether both targets are the same, so that none can be preferred.

    A row does not hold them. The same target has the same log-probability, before the edit too,
    when no model is so broken that it gives two targets the same.
    """
    ends = [end for end in ("before", "after") if f"target_new_logprob_{end}" in row]
    return all(row[f"target_new_logprob_{e}"] == row[f"target_true_logprob_{e}"] for e in ends)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Share of the target's tokens that are the argmax, teacher-forced (the paper's tables).
        Protocol(
            "token",
            "after_ids",
            lambda row: _token_share(row["after_ids"], row["target_ids"]),
            lambda row: _token_share(row["after_ids"], row["before_ids"]),
        ),
        # All of them.
        Protocol(
            "exact",
            "after_ids",
            lambda row: _all_equal(row["after_ids"], row["target_ids"]),
            lambda row: _all_equal(row["after_ids"], row["before_ids"]),
        ),
        # Greedy decoding to the gold length gives exactly the target's tokens.
        Protocol(
            "free",
            "free_after_ids",
            lambda row: _all_equal(row["free_after_ids"], row["target_ids"]),
            lambda row: _all_equal(row["free_after_ids"], row["free_before_ids"]),
        ),
        # Greedy decoding with a question-answer prompt and a natural stop begins with the target,
        # after normalisation (Yang et al. 2025, without a judge; see `answers`).
        Protocol(
            "wild",
            "wild_after",
            lambda row: float(begins_with(row["wild_after"], row["target"])),
            lambda row: float(normalise(row["wild_before"]) == normalise(row["wild_after"])),
        ),
        # P(target_new) > P(target_true), per token (Meng et al. 2022); the true answer stays ahead.
        Protocol(
            "probability",
            "target_new_logprob_after",
            lambda row: _preferred(row, "new", "true"),
            lambda row: _preferred(row, "true", "new"),
        ),
    )
}
#: Stands for a protocol where a metric is of a model state.
HEALTH = "health"


def _has_no_score(*_: Any) -> float:
    raise TypeError("a metric that aggregates others has no score of its own")


@dataclass(frozen=True)
class Metric:
    """One measure, and all that the rest of the project knows about it.

    Of ``per="request"``: prompts of ``kinds`` are scored by ``score(row, protocol)``, where the
    predictions have all of ``columns``; ``aggregate`` (pandas' name of it) makes one value of a
    request's prompts. Without ``kinds`` it aggregates other metrics, its ``columns``.
    Of ``per="state"``: ``score(row)`` reads ``columns`` of one measurement of the model.
    """

    name: str  # in files
    label: str  # in tables and figures
    meaning: str
    score: Callable[..., float] = _has_no_score
    kinds: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    aggregate: str = "mean"
    per: Literal["request", "state"] = "request"
    higher_is_better: bool = True
    unit: str = "percent"
    digits: int = 1
    column: int | None = None  # place in tables, from the left; None: in metrics files alone
    in_paper: bool = False

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown in its unit."""
        return 100.0 if self.unit == "percent" else 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        """The metrics that this one aggregates; none if it is measured itself."""
        return self.columns if self.per == "request" and not self.kinds else ()

    @property
    def direction(self) -> int:
        """1 if higher is better, else −1."""
        return 1 if self.higher_is_better else -1


def _says_target(row: Row, protocol: Protocol) -> float:
    return protocol.says_target(row)


def _unchanged(row: Row, protocol: Protocol) -> float:
    return protocol.unchanged(row)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "efficacy",
            "Efficacy",
            "says the target on the prompt of the edit",
            _says_target,
            kinds=("edit",),
            column=1,
            in_paper=True,
        ),
        Metric(
            "generality",
            "Generality",
            "says the target on paraphrases",
            _says_target,
            kinds=("paraphrase",),
            column=3,
            in_paper=True,
        ),
        Metric(
            "locality",
            "Locality",
            "says on unrelated prompts what the unedited model says",
            _unchanged,
            kinds=("locality",),
            columns=("before_ids",),
            column=2,
            in_paper=True,
        ),
        Metric(
            "portability",
            "Portability",
            "says what follows from the target",
            _says_target,
            kinds=("portability",),
        ),
        Metric(
            "score",
            "Score",
            "mean of Efficacy, Generality and Locality",
            columns=("efficacy", "generality", "locality"),
            column=4,
            in_paper=True,
        ),
        Metric(
            "perplexity",
            "Perplexity",
            "token perplexity on neutral text",
            itemgetter("perplexity"),
            columns=("perplexity",),
            per="state",
            higher_is_better=False,
            unit="perplexity",
        ),
        Metric(
            "perplexity_ratio",
            "Perplexity ×",
            "token perplexity on neutral text over the unedited model's",
            itemgetter("perplexity_ratio"),
            columns=("perplexity_ratio",),
            per="state",
            higher_is_better=False,
            unit="ratio",
            digits=2,
            column=5,
        ),
        Metric(
            "nll_difference",
            "Δ NLL",
            "mean negative log-likelihood on neutral text minus the unedited model's",
            itemgetter("nll_difference"),
            columns=("nll_difference",),
            per="state",
            higher_is_better=False,
            unit="nats",
            digits=3,
        ),
        Metric(
            "kl",
            "KL",
            "KL divergence of the unedited model's next tokens from the model's on neutral text",
            itemgetter("kl"),
            columns=("kl",),
            per="state",
            higher_is_better=False,
            unit="nats",
            digits=3,
            column=6,
        ),
        Metric(
            "same_argmax",
            "Same token",
            "share of positions of neutral text where the unedited model's first choice stays",
            itemgetter("same_argmax"),
            columns=("same_argmax",),
            per="state",
        ),
    )
}


def metrics_of(per: str, *, tabled: bool = False) -> list[Metric]:
    """List the metrics of a request or of a state; ``tabled``: those that tables show."""
    chosen = [metric for metric in METRICS.values() if metric.per == per]
    return [metric for metric in chosen if metric.column is not None] if tabled else chosen


def table_columns(per: str) -> list[Metric]:
    """List the metrics that tables show, in the order of their columns."""
    return sorted(metrics_of(per, tabled=True), key=lambda metric: metric.column or 0)
