"""The steps of a training run: taken, logged, evaluated on the way, the best model kept, ended early.

All that decides how the run goes on stands in its log: which evaluation was the best, and how many there
were since. A run that is resumed reads it there and takes the same decisions.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engines.base import Batch, Engine
from engines.errors import NonFiniteLoss, UserError
from engines.transfer.clock import now_s
from engines.world import ALONE, World
from harness.data.batches import Data
from harness.models.export import holds_something
from harness.progress import Progress
from harness.records import metrics
from harness.records.governance import Governance
from harness.records.job import Job
from harness.signals import on_first_signal
from harness.training import restore
from harness.training.led_engine import STEP
from harness.training.update_log import UpdateLog, cannot_write
from profiles.units import DAY_S, format_seconds

BEST, SUMMARY, BOARD = "best", "summary.json", "tensorboard"
RECENT = 50
"""Steps whose times and losses say how it goes."""
BOARD_INSTALL = "pip install 'lspzo-bench[tensorboard]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best evaluation of a run."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSummary:
    """What `summary.json` holds of a run that has come to its end."""

    engine: str
    seed: int
    steps: int
    """Steps done."""
    ended_early: bool
    train_loss: float | None
    """Mean over the last steps of this call; `None`: it took none."""
    step_s: float | None
    """Median of this call's last steps, evaluation apart."""
    real_tokens_per_s: float | None
    """Padding not counted."""
    metrics: dict[str, float]
    """Of the last evaluation."""
    best: Best | None
    governance: Governance
    """Where what it read and wrote lies, and which hosts this call contacted."""
    schema_version: int = 1

    def one_line(self) -> str:
        """In one line for a person."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        parts = [steps + (", ended early" if self.ended_early else "")]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.4g}")
        if self.step_s is not None and self.real_tokens_per_s is not None:
            parts.append(f"{format_seconds(self.step_s)} a step, {self.real_tokens_per_s:,.0f} tokens/s")
        if self.metrics:
            parts.append(f"held-out {metrics.metrics_text(self.metrics)}")
        if self.best is not None:
            value = metrics.metrics_text({self.best.metric: self.best.value})
            parts.append(f"best {value} after {self.best.step} steps")
        return "; ".join(parts)


@dataclass(kw_only=True)
class Course:
    """What the steps of one run need beside its engine."""

    job: Job
    data: Data
    out: Path
    save_every: int
    updates: UpdateLog | None
    progress: Progress
    judge: Callable[[Any], dict[str, float]]
    """An evaluation -> its metrics."""
    export: Callable[[Path], None]
    """Write the model as it is now into a folder."""
    board: bool = False
    """Write files for TensorBoard too."""
    world: World = ALONE
    """The others take each step when they are told to."""
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    tokens: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    last: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    since_best: int = 0
    """Evaluations since the best one."""
    done: int = 0

    @property
    def ends_early(self) -> bool:
        return 0 < self.job.patience <= self.since_best

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        every = self.job.eval_every
        return step in (0, self.job.steps) or bool(every and step % every == 0)

    def summary(self, engine: str, governance: Governance) -> TrainingSummary:
        return TrainingSummary(
            engine=engine,
            seed=self.job.seed,
            steps=self.done,
            ended_early=self.done < self.job.steps,
            train_loss=statistics.fmean(self.losses) if self.losses else None,
            step_s=statistics.median(self.times_s) if self.times_s else None,
            real_tokens_per_s=sum(self.tokens) / sum(self.times_s) if self.times_s else None,
            metrics=self.last,
            best=self.best if self.job.eval_every else None,
            governance=governance,
        )


def real_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of the batches without padding."""
    return sum(batch.real_tokens for batch in batches)


def run_steps(engine: Engine, course: Course, done: int) -> None:
    """Steps `done` to the last, or to where patience ends, logged and evaluated.

    Raises `KeyboardInterrupt` after the first signal, the run being left so that it can be resumed.
    """
    job, progress = course.job, course.progress
    path = course.out / restore.LOSS_LOG
    stop = _StopAfterStep()
    _remember(course, path)
    course.done = done
    with _open_log(path) as log, _board(course) as board, on_first_signal(stop.ask):
        if course.is_due(done) and (done == 0 or done < job.steps):
            _evaluate(engine, course, log, board, done)
        for step in range(done, job.steps):
            if course.ends_early:
                break
            loss = _take_step(engine, course, log, step)
            progress.update("training", step + 1, job.steps, note=_note(course, loss))
            board("train/loss", loss, step + 1)
            if step + 1 < job.steps and course.is_due(step + 1):
                _evaluate(engine, course, log, board, step + 1)
            if stop.asked:
                _save(engine, course, step + 1)
                _stop(course.out, step + 1, job.steps, progress)
            if course.save_every and (step + 1) % course.save_every == 0:
                _save(engine, course, step + 1)
        if course.ends_early:
            best = course.best
            at = "" if best is None else f", the best being that after {best.step} steps"
            progress.print(
                f"ended after {course.done} steps: {course.since_best} evaluations were no better{at}"
            )
        else:
            _evaluate(engine, course, log, board, job.steps)
        if stop.asked:
            _save(engine, course, course.done)
            _stop(course.out, course.done, job.steps, progress)


def _take_step(engine: Engine, course: Course, log: IO[str], step: int) -> float:
    """One step, which is in the logs then; its loss. Raises `NonFiniteLoss`."""
    batches = course.data.step_batches(step)
    began = now_s()
    course.world.broadcast(STEP)
    stats = engine.step(batches)
    if not math.isfinite(stats.loss):
        raise NonFiniteLoss(f"the loss of step {step} is {stats.loss}")
    course.times_s.append(now_s() - began)
    course.losses.append(stats.loss)
    course.tokens.append(real_tokens(batches))
    # In this order: a kill between the two leaves a line too many, which resuming takes away.
    _write(log, step=step + 1, loss=stats.loss)
    if course.updates is not None:
        if not stats.updates:
            raise RuntimeError(f"{engine.name} reported no update of step {step}")
        course.updates.append(*stats.updates)
    course.done = step + 1
    return stats.loss


def _save(engine: Engine, course: Course, step: int) -> None:
    """A full checkpoint, unless the log of updates is one and no other was asked for."""
    if course.updates is not None:
        course.updates.sync()  # or a power cut could leave a log that ends before the checkpoint
    if course.save_every or course.updates is None:
        restore.write_checkpoint(engine, course.out, step)


def _note(course: Course, loss: float) -> str:
    """Loss, step time, real tokens a second, and how long the rest takes."""
    step_s = statistics.median(course.times_s)
    rate = sum(course.tokens) / max(sum(course.times_s), 1e-9)
    left_s = step_s * (course.job.steps - course.done)
    return f"loss {loss:.4g}, {format_seconds(step_s)} a step, {rate:,.0f} tokens/s, {_duration(left_s)} left"


def _duration(seconds: float) -> str:
    if seconds >= 2 * DAY_S:
        return format_seconds(seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _evaluate(engine: Engine, course: Course, log: IO[str], board: Callable[..., None], step: int) -> None:
    """Log and tell the metrics; keep the model where it is the best so far and evaluations choose."""
    if not course.data.evaluation:
        return
    result = engine.evaluate(course.data.evaluation)
    found = course.judge(result)
    course.last = found
    metric = metrics.chosen_metric(course.job.best_by, found)
    more = {f"eval_{name}": value for name, value in found.items() if name not in ("loss", "accuracy")}
    _count_evaluation(course, step, metric, found[metric])
    if course.job.eval_every and step and course.best is not None and course.best.step == step:
        _keep_best(course, step)
    _write(log, step=step, eval_loss=result.loss, eval_accuracy=result.accuracy, **more)
    when = f"after {step} steps" if step else "before training"
    course.progress.print(f"{when}: held-out {metrics.metrics_text(found)}")
    for name, value in found.items():
        board(f"held-out/{name}", value, step)


def _count_evaluation(course: Course, step: int, metric: str, value: float) -> None:
    """As the best, or as one more that is not. What was before training is no model to keep."""
    if step == 0:
        return
    if metrics.is_better(metric, value, None if course.best is None else course.best.value):
        course.best, course.since_best = Best(step=step, metric=metric, value=value), 0
    else:
        course.since_best += 1


def _remember(course: Course, path: Path) -> None:
    """The evaluations that a run that is resumed has had."""
    for values in restore.evaluations_of(path):
        found = {name.removeprefix("eval_"): value for name, value in values.items() if name != "step"}
        course.last = found
        metric = metrics.chosen_metric(course.job.best_by, found)
        _count_evaluation(course, int(values["step"]), metric, found[metric])


def _keep_best(course: Course, step: int) -> None:
    """The model in `best/step-NNNNNNNN`, then no other there: a kill at any moment leaves one."""
    folder = course.out / BEST
    final = folder / f"step-{step:08d}"
    if not holds_something(final):  # else of the same run, which takes the same steps
        folder.mkdir(exist_ok=True)
        course.export(final)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _board(course: Course) -> Iterator[Callable[..., None]]:
    """`add(name, value, step)` into files for TensorBoard, or into nothing."""
    if not course.board:
        yield lambda *_: None
        return
    writer = _board_writer(course.out / BOARD)
    try:
        yield writer.add_scalar
    finally:
        writer.close()


def _board_writer(folder: Path) -> Any:
    """Raises `UserError` where the package is not there."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise UserError("--tensorboard", "tensorboard is not installed", BOARD_INSTALL) from None
    return Writer(str(folder))


def _stop(out: Path, step: int, total: int, progress: Progress) -> None:
    """Raises `KeyboardInterrupt`."""
    progress.print(f"stopped after step {step} of {total}; go on with --resume --out {shlex.quote(str(out))}")
    raise KeyboardInterrupt


class _StopAfterStep:
    """Whether the run was asked to stop: looked at between steps."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        self.asked = True


@contextmanager
def _open_log(path: Path) -> Iterator[IO[str]]:
    try:
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        yield log
    finally:
        with suppress(OSError):  # of a line that could not be written, which `_write` has reported
            log.close()


def _write(log: IO[str], **values: float) -> None:
    try:
        log.write(json.dumps(values) + "\n")
        log.flush()
    except OSError as error:
        raise cannot_write(Path(log.name), error) from None
