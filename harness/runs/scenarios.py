"""What a run repeats: optimizer steps on a job's data, or decoding steps of random prompts. No torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from engines.base import Batch, Engine, Evaluation, StepStats, SupportsRealizedUpdates
from engines.decoding import GenerationRequest
from harness.records.job import Job
from harness.records.learning import Evaluated, Learning, LearningOutcome
from harness.runs.end_states import OUT_OF_MEMORY, classify
from harness.runs.measure import Clock, RunRecording


class StepData(Protocol):
    """What `harness.data.batches.Data` offers to a run."""

    @property
    def evaluation(self) -> Sequence[Batch]: ...

    @property
    def test(self) -> Sequence[Batch]: ...

    @property
    def evaluated_in_training(self) -> int: ...

    def step_batches(self, step: int) -> Sequence[Batch]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """The job's optimizer steps, with an evaluation before and after them where it asks for one."""

    job: Job
    data: StepData
    is_drained: ClassVar[bool] = True
    has_loss: ClassVar[bool] = True
    own_s: ClassVar[None] = None

    @property
    def warmup_steps(self) -> int:
        return self.job.warmup_steps

    @property
    def steps(self) -> int:
        return self.job.steps

    def before(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        if self.job.eval_batches > 0:
            self._evaluate(engine, recording, clock)

    def take(self, engine: Engine) -> Generator[StepStats, None, None]:
        for step in range(self.warmup_steps + self.steps):
            yield engine.step(self.data.step_batches(step))

    def after(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        """The share that reached the weights is asked for last: all else is measured by then."""
        counted = range(self.warmup_steps, self.warmup_steps + self.steps)
        batches = [batch for step in counted for batch in self.data.step_batches(step)]
        if batches:
            computed = sum(batch.inputs["input_ids"].numel() for batch in batches)
            real = sum(batch.real_tokens for batch in batches)
            recording.real_tokens_per_step = real / self.steps
            recording.padded_share = 1 - real / computed
        if self.job.eval_batches > 0:
            self._evaluate(engine, recording, clock)
        recording.landed_share = _realized_update_fraction(engine)

    def _evaluate(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        engine.synchronize()
        started_s = clock()
        recording.evaluations.append(engine.evaluate(self.data.evaluation))
        recording.evaluated_in_training = self.data.evaluated_in_training
        engine.synchronize()
        recording.eval_s.append(clock() - started_s)


Judge = Callable[[Evaluation], dict[str, float]]
"""An evaluation -> its metrics."""


class Learn:
    """Steps until a given time or number is reached, with evaluations on the way.

    Development data says which evaluation is the best; test data is evaluated with the weights of that one
    alone, as soon as it is known to be the best so far, so that no weights have to be kept: what it says of
    others is thrown away unread. `write` gets what was learned, at each evaluation anew.
    """

    is_drained: ClassVar[bool] = True
    has_loss: ClassVar[bool] = True
    warmup_steps: ClassVar[int] = 0

    def __init__(
        self, learning: Learning, data: StepData, judge: Judge, write: Callable[[LearningOutcome], None]
    ) -> None:
        self._learning = learning
        self._data = data
        self._test = data.test if learning.tests else ()
        self._judge = judge
        self._write = write
        self._clock: Clock = _no_clock
        self._learned = LearningOutcome()
        self.own_s: float | None = None
        """Of the step that was just taken."""

    @property
    def steps(self) -> int:
        """Most of them: where time decides, nobody knows how many there will be."""
        return self._learning.length.steps or NO_LIMIT

    def before(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        self._clock = clock
        self._evaluate(engine)
        if self._test:
            self._learned = replace(self._learned, test_before=self._on_test(engine))
            self._write(self._learned)

    def take(self, engine: Engine) -> Generator[StepStats, None, None]:
        length, step, train_s, evaluated = self._learning.length, 0, 0.0, 0
        while not length.is_over(step, train_s):
            began_s = self._clock()
            stats = engine.step(self._data.step_batches(step))
            step += 1
            if length.evaluations_due(step, train_s + self._clock() - began_s) > evaluated:
                engine.synchronize()  # what is in flight belongs to the step
            self.own_s = self._clock() - began_s
            train_s += self.own_s
            self._learned = replace(self._learned, steps=step, train_s=train_s)
            if not math.isfinite(stats.loss):
                yield stats
                return
            due = length.evaluations_due(step, train_s)
            if due > evaluated:
                evaluated = due
                self._evaluate(engine)
            yield stats

    def after(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        self._write(self._learned)

    def _evaluate(self, engine: Engine) -> None:
        began_s = self._clock()
        metrics = self._judge(engine.evaluate(self._data.evaluation))
        learned = self._learned
        found = Evaluated(step=learned.steps, train_s=learned.train_s, metrics=metrics)
        learned = replace(learned, evaluations=(*learned.evaluations, found))
        if self._test and learned.best(self._learning.metric) is found:
            learned = replace(learned, test=self._on_test(engine))
        self._learned = replace(learned, eval_s=learned.eval_s + self._clock() - began_s)
        self._write(self._learned)

    def _on_test(self, engine: Engine) -> dict[str, float]:
        return self._judge(engine.evaluate(self._test))


def _no_clock() -> float:
    raise RuntimeError("`before` gives the clock")


NO_LIMIT = 1_000_000_000
"""Steps, where time decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """The decoding steps of `request`, with an engine that is an `engines.decoding.GeneratingEngine` too.

    A step lasts from one token of each sequence to the next, on the host; the first one is the prefill. One
    step is under way whenever tokens arrive, so the last step of `request` is started and not counted. There
    is no loss. The same prefill comes once before, untimed, so that the timed one is not the process's first.
    """

    request: GenerationRequest
    warmup_steps: int
    """The prefill is the first of them."""
    is_drained: ClassVar[bool] = False
    has_loss: ClassVar[bool] = False
    own_s: ClassVar[None] = None

    @property
    def steps(self) -> int:
        return self.request.max_new_tokens - 1 - self.warmup_steps

    def before(self, engine: Any, recording: RunRecording, clock: Clock) -> None:
        """A prefill, and the step that is under way when its tokens arrive."""
        with contextlib.closing(self.take(engine)) as steps:
            next(steps)
        engine.synchronize()

    def take(self, engine: Any) -> Generator[StepStats, None, None]:
        with contextlib.closing(engine.generate(self.request)) as tokens:
            for decoded in tokens:
                yield decoded.stats

    def after(self, engine: Any, recording: RunRecording, clock: Clock) -> None:
        engine.synchronize()


def _realized_update_fraction(engine: Engine) -> float | None:
    """What the engine says of it; `None` where it says nothing, lacks the memory or says what is not finite.

    Any other error that the engine raises now is of its last step, whose work may end only here, and ends the
    run.
    """
    if not isinstance(engine, SupportsRealizedUpdates):
        return None
    try:
        share = engine.realized_update_fraction()
    except (MemoryError, RuntimeError) as error:
        # One with a cause is of a thread of the engine, and not of the asking.
        if error.__cause__ is not None or classify(error)[0] not in OUT_OF_MEMORY:
            raise
        return None
    return share if share is None or math.isfinite(share) else None
