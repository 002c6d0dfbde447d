"""The pipelines: batch, consecutive and breadth first.

**batch**: the requests are split into batches; each is edited at once from the original
model, evaluated, and rolled back. **consecutive**: one turn after another without
rollback, a turn being one request or several that are edited at once; predictions are made right
after each turn for its requests ("write"), for all requests so far, or a fixed sample of them,
behind the turns in which 1, 3, 10, 30, 100, ... edits are reached ("milestone"), and for all
requests on the final model ("final"). The health of the model is measured at "milestone" and
"final", and so is what the edits have left; what a question costs, once at the end of a run or of
its first batch.
**breadth_first**: all requests at once, without rollback; the editor passes over them in
mini-batches, several times, and the final model is evaluated.

Runs save their state (after every batch; every few edits, where a turn ends; every epoch, which
the name of a breadth-first checkpoint counts; before the final evaluation, which may take longer
than the edits) and resume from it with the same bytes. Asked to stop by SIGTERM or SIGUSR1, they
finish the turn or epoch under way, save, and end; in the final evaluation they end at once.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch

from kmebench.data.records import EditRequest
from kmebench.editors.base import AfterEpoch, Editor, Result, Stopwatch, named
from kmebench.edits.edit import Edit
from kmebench.errors import EditError, ModelError
from kmebench.evaluation.frames import predicted_frame
from kmebench.evaluation.predict import Settings
from kmebench.evaluation.prompts import prompts_of
from kmebench.io.logs import track
from kmebench.memory import NoMemoryError, halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.pipelines.checkpoints import Checkpoints, Outcome
from kmebench.pipelines.footprint import bytes_left, question_milliseconds
from kmebench.preemption import ended_by_signals, noted_signals

logger = logging.getLogger("kmebench")

#: Measures the model as it is now (kmebench.evaluation.health).
Measure = Callable[[EditableModel], Mapping[str, float]]


@dataclass
class Setup:
    """What a run edits with, and how: the same for every pipeline."""

    model: EditableModel
    editor: Editor
    settings: Settings
    checkpoints: Checkpoints
    skip_failed: bool = False
    measure: Measure | None = None


def run_batches(setup: Setup, requests: Sequence[EditRequest], batch_size: int) -> Outcome:
    """Edit batch after batch, each from the original model, resuming behind the last one saved."""
    run = _Run.restored(setup)
    starts = range(run.done, len(requests), batch_size)
    with noted_signals() as stopped_by:
        for start in track(starts, "batches edited", len(starts)):
            batch = requests[start : start + batch_size]
            run.edit(batch)
            with run.finished(noted=True):
                asked = enumerate(batch, start=start)
                run.predict(asked, "final", len(batch), start // batch_size)
                if not start:  # of later batches it would be the same
                    run.weigh(len(batch))
                    run.time_questions(batch)
            setup.model.revert()
            # An independent run starts without memory of the batch before.
            setup.editor.load_state_dict({})
            run.done = start + len(batch)
            if run.done < len(requests):
                run.save(stopped_by)
    return run.outcome_with_predictions()


def run_consecutive(
    setup: Setup,
    requests: Sequence[EditRequest],
    turn: int = 1,
    milestone_sample: int | None = None,
) -> Outcome:
    """Edit ``turn`` requests after another, resuming from the newest checkpoint.

    The last turn holds what is left. Behind a milestone, ``milestone_sample`` of the edits so far
    are asked at most; all where none is given.
    """
    run, n, every = _Run.restored(setup), len(requests), setup.checkpoints.every
    numbered = list(enumerate(requests))
    starts, asked_at = range(run.done, n, turn), milestones(n)
    with noted_signals() as stopped_by:
        for start in track(starts, "turns edited" if turn > 1 else "requests edited", len(starts)):
            group = numbered[start : start + turn]
            run.edit([request for _, request in group])
            run.done += len(group)
            run.predict(group, "write", run.done)
            if run.done < n and any(start < edits <= run.done for edits in asked_at):
                asked = positions_asked(n, run.done, milestone_sample)
                with run.finished():
                    run.predict([numbered[i] for i in asked], "milestone", run.done)
                    run.measure(run.done)
                    run.weigh(run.done)
            if run.done // every > start // every or run.done == n or stopped_by():
                run.save(stopped_by)
    run.conclude(requests)
    return run.outcome_with_predictions()


def run_breadth_first(setup: Setup, requests: Sequence[EditRequest]) -> Outcome:
    """Edit all requests in one call, without rollback, resuming behind the last epoch saved.

    What is saved behind the call counts as many epochs as before, or one.
    """
    run = _Run.restored(setup)
    if not run.outcome.times:  # the call has not returned yet
        with noted_signals() as stopped_by:
            run.edit(requests, lambda epochs: run.save(stopped_by, epochs))
            run.save(stopped_by, run.done or 1)
    run.conclude(requests)
    return run.outcome_with_predictions()


def milestones(n: int) -> set[int]:
    """Return 1, 3, 10, 30, 100, ... below ``n``: the edits after which all so far are scored."""
    values: set[int] = set()
    power = 1
    while power < n:
        values |= {power, 3 * power}
        power *= 10
    return {value for value in values if value < n}


def positions_asked(n: int, done: int, most: int | None = None) -> list[int]:
    """Return which of the first ``done`` of ``n`` requests are asked: all, or a sample of ``most``.

    The sample is uniform, and the same for every editor: of one random order of all n requests,
    the first that are done.
    """
    order = random.Random(0).sample(range(n), n)
    return sorted([i for i in order if i < done][:most])


@dataclass
class _Run:
    """A run under way: what is done, and what has come of it."""

    setup: Setup
    done: int = 0
    frames: list[pd.DataFrame] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)

    @classmethod
    def restored(cls, setup: Setup) -> "_Run":
        """Go on from the newest checkpoint, or begin.

        Raises:
            EditError: it lacks an edit that failed, which this run is not to skip.
        """
        run = cls(setup, *setup.checkpoints.restore(setup.model, setup.editor))
        if run.outcome.failed and not setup.skip_failed:
            raise EditError(
                f"{run.outcome.failed[0]['error']} It was skipped before: set on_failed_edit: skip "
                f"again, or delete {setup.checkpoints.folder} to begin anew."
            )
        return run

    def edit(self, batch: Sequence[EditRequest], after_epoch: AfterEpoch | None = None) -> None:
        """Edit and apply; a failed edit changes neither model nor editor."""
        model, editor, outcome = self.setup.model, self.setup.editor, self.outcome
        try:
            result = self._checked(batch, after_epoch)
        except EditError as error:
            if not self.setup.skip_failed:
                raise
            logger.warning("skipped: %s", error)
            outcome.failed.append({"case_ids": [r.case_id for r in batch], "error": str(error)})
            result = editor.result(Edit())
        applying = Stopwatch()
        with applying("apply"):
            model.apply(result.edit)
        seconds = {**result.seconds, **applying.seconds}
        outcome.times.append({"requests": len(batch), "steps": result.steps, "seconds": seconds})
        outcome.norms.append(result.edit.weights.norms())

    def _checked(self, batch: Sequence[EditRequest], after_epoch: AfterEpoch | None) -> Result:
        """Call the editor; every failure of an edit names its requests."""
        model, editor = self.setup.model, self.setup.editor
        who, random = named(batch), torch.get_rng_state()

        def edit(micro_batch: int) -> Result:
            torch.set_rng_state(random)
            if micro_batch != whole:  # for the rest of the run, whose record will say so
                self.outcome.micro_batch = micro_batch
            return editor(model, batch, micro_batch, after_epoch)

        whole = self.outcome.micro_batch or editor.whole_micro_batch
        try:
            mend = "lower micro_batch, batch_size or turn, or choose a smaller dtype"
            return halved_if_needed(edit, whole, f"editing {who}", mend)
        except NoMemoryError as error:
            raise EditError(str(error)) from error
        except ModelError as error:  # a text that the model cannot be given
            raise EditError(f"Cannot edit {who}: {error}") from error

    @contextmanager
    def finished(self, *, noted: bool = False) -> Iterator[None]:
        """Carry what the editor adds at the end of a run while the block runs.

        Where the run does end (``noted``), the time is noted in the last call of the editor.
        """
        model, stopwatch = self.setup.model, Stopwatch()
        with stopwatch("final_edit"):
            last = Edit.of(self.setup.editor.final_edit(model))
        if not last:
            yield
            return
        with model.edits.savepoint():
            with stopwatch("final_edit"):
                model.apply(last)
            if noted:
                self.outcome.times[-1]["seconds"] |= stopwatch.seconds
            yield

    def conclude(self, requests: Sequence[EditRequest]) -> None:
        """Evaluate the final model of a run without rollback, and keep all of its edits.

        Raises:
            PreemptedError: a signal came; all edits are saved.
        """
        n, checkpoints = len(requests), self.setup.checkpoints
        ended = ended_by_signals(lambda name: checkpoints.stopped(name, self.done))
        with ended, self.finished(noted=True):
            self.predict(enumerate(requests), "final", n)
            self.measure(n)
            self.weigh(n)
            self.time_questions(requests)
            self.outcome.edit = self.setup.model.edits.total()

    def predict(
        self,
        requests: Iterable[tuple[int, EditRequest]],
        when: str,
        edits_done: int,
        batch: int = 0,
    ) -> None:
        """Predict all prompts of ``requests``, which come with their positions.

        Free decoding is slow and made at the end alone.
        """
        prompts = [p for i, r in requests for p in prompts_of(r, i)]
        model, settings, decode = self.setup.model, self.setup.settings, when == "final"
        started = time.perf_counter()
        frame = predicted_frame(model, prompts, settings, decode=decode)
        self.outcome.evaluation_seconds += time.perf_counter() - started
        self.frames.append(frame.assign(when=when, edits_done=edits_done, batch=batch))

    def measure(self, edits_done: int) -> None:
        """Note the health of the model as it is now, and its change; its time is no edit's."""
        if self.setup.measure:
            started = time.perf_counter()
            measured = self.setup.measure(self.setup.model)
            change = self.setup.model.edits.total().weights
            norms = {"frobenius": change.norms(), "spectral": change.spectral_norms()}
            self.outcome.health.append({"edits_done": edits_done, **measured, "change": norms})
            self.outcome.evaluation_seconds += time.perf_counter() - started

    def weigh(self, edits_done: int) -> None:
        """Note the bytes that the edits have left."""
        left = bytes_left(self.setup.model, self.setup.editor)
        self.outcome.bytes.append({"edits_done": edits_done, **left})

    def time_questions(self, requests: Sequence[EditRequest]) -> None:
        """Note what a question about ``requests`` costs before and after the edits."""
        started = time.perf_counter()
        setup, outcome = self.setup, self.outcome
        outcome.question_milliseconds = question_milliseconds(
            setup.model, requests, setup.settings, outcome.evaluation_seconds
        )
        outcome.evaluation_seconds += time.perf_counter() - started

    def save(self, stopped_by: Callable[[], str | None], done: int | None = None) -> None:
        """Write a checkpoint after ``done`` edits or epochs; see :meth:`Checkpoints.save`."""
        setup, self.done = self.setup, self.done if done is None else done
        setup.checkpoints.save(
            setup.model, setup.editor, self.done, self.frames, self.outcome, stopped_by
        )

    def outcome_with_predictions(self) -> Outcome:
        """Return the outcome of a run that is complete."""
        self.outcome.predictions = pd.concat(self.frames, ignore_index=True)
        return self.outcome
