"""Fine-tune for real with one engine, and export a Hugging Face folder.

What lies in `<out>` stands in `harness.training.run_folder`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from engines import load_engine
from engines.base import Batch, Context, Engine, TellsTrace
from engines.costs.lsp import core_size
from engines.errors import InfeasiblePlan, NonFiniteLoss, NotAvailable, UserError
from engines.files.checksums import check_sums
from engines.files.locks import locked_folder
from engines.files.writing import clear_leftovers
from engines.model.blocks import TORCH_DTYPE
from engines.settings.given import GivenSettings
from engines.settings.lsp import LspSettings
from engines.shapes import ModelShape
from harness.data.batches import Data, make_data
from harness.models.blueprint import ModelBlueprint, export_model, make_blueprint
from harness.models.export import holds_something, refuse_in_use
from harness.progress import Progress
from harness.records.environment import gpu_notes
from harness.records.job import Job
from harness.resolve import resolve_shape
from harness.runs.divergence import why_flat, why_not_finite
from harness.runs.end_states import OUT_OF_MEMORY, classify
from harness.runs.worker import TRACE, prepare_torch, usable_host_bytes, write_trace
from harness.signals import on_first_signal
from harness.training import restore
from harness.training.room import check_room
from harness.training.run_folder import (
    MODEL,
    TrainingRun,
    claim,
    given_back_if_refused,
    method_of,
    read_run,
    refuse_folder_in_use,
)
from harness.training.update_log import UpdateLog, cannot_write, read_update_log, refuse_damaged
from profiles.documents import check_writable


def train(
    job: Job,
    engine_name: str,
    settings: GivenSettings,
    out: Path,
    *,
    save_every: int,
    resume: bool,
    progress: Progress,
    trace: bool = False,
) -> Path:
    """Train `job.steps` steps and return the exported folder.

    A run that is resumed takes the same job and engine, keeps its settings, and ends with the same weights as
    one that was never stopped; one that is finished stays as it is. The first of `harness.signals.ENDING`
    ends the step, sees to it that the run can be resumed and raises `KeyboardInterrupt`; a second does not
    wait.

    Raises `UserError` if `out` is in use or cannot be written or has no room for what the run writes, the job
    differs, the engine cannot run here, memory runs out, or the loss is not finite. Checkpoints are kept; a
    new run that has logged nothing leaves nothing.
    """
    shape = resolve_shape(job)  # before the folder is claimed: a mistake in the job must leave it free
    method = method_of(engine_name, settings.typed)
    refuse_folder_in_use(out, resume)
    folder = out / MODEL
    with locked_folder(out):
        clear_leftovers(out)
        shutil.rmtree(out / restore.CHECKPOINTS / restore.WRITING, ignore_errors=True)
        typed = claim(job, method, out, resume)
        if resume and holds_something(folder):
            check_sums(folder, f"delete {MODEL}/ there to have it written again")
            progress.print(f"the run is finished, and its model written; {job.steps} steps were asked for")
            return folder
        _train(job, engine_name, shape, typed, out, save_every, resume, progress, trace)
    _note_if_flat(job, engine_name, out, progress)
    return folder


def _train(
    job: Job,
    engine_name: str,
    shape: ModelShape,
    typed: Any,
    out: Path,
    save_every: int,
    resume: bool,
    progress: Progress,
    trace: bool,
) -> None:
    """The steps that are left, and the export, in a folder that is claimed."""
    with given_back_if_refused(out, resume):
        check_room(out, shape, job, engine_name, typed, save_every)
        _warn_of_no_compression(typed, shape, progress)
        for note in gpu_notes():
            progress.print(f"note: {note}")
        data = make_data(job, shape)
        for line in (*data.readings, data.describe()):
            progress.print(line)
        kept = out / TRACE if trace else None
        with (
            user_errors(engine_name, job, out),
            set_up(job, shape, engine_name, typed, progress, kept, data.step_batches(0)[0]) as (
                engine,
                blueprint,
            ),
        ):
            num_tensors = len(blueprint.parameter_shapes)
            if resume:
                done, updates = restore.resume(engine, num_tensors, job, typed, out, progress)
            else:
                done, updates = 0, restore.start(engine, num_tensors, job, typed, out, 0, progress)
            with closing(updates) if updates is not None else nullcontext():
                _run_steps(engine, data, job, out, done, save_every, updates, progress)
            try:
                export_model(blueprint, engine.weights(), TORCH_DTYPE[job.dtype], out / MODEL)
            except UserError:
                if updates is None and restore.step_of(restore.newest_checkpoint(out)) < job.steps:
                    # Else the trained weights would end with this process.
                    restore.write_checkpoint(engine, out, job.steps)
                raise


def export_run(out: Path, to: Path | None, progress: Progress) -> Path:
    """Write the model of the run in `out` as it is now, without training; the folder that was written.

    The run may be finished, stopped, killed or going on. `to` is by default `<out>/export-step-NNNNNNNN`.
    Raises `UserError` if `out` holds no run or nothing to export, if `to` is in use, and as `train` does.
    """
    run = read_run(out)
    _check_free(to or _export_folder(out, run.step))
    with rebuilt(run, run.job, run.method.engine, run.settings, progress) as (engine, blueprint, step):
        folder = to or _export_folder(out, step)
        export_model(blueprint, engine.weights(), TORCH_DTYPE[run.job.dtype], folder)
    progress.print(f"exported the weights after {step} of {run.job.steps} steps")
    return folder


@contextmanager
def rebuilt(
    run: TrainingRun, job: Job, engine_name: str, settings: Any, progress: Progress
) -> Iterator[tuple[Any, ModelBlueprint, int]]:
    """An engine with the weights of `run`, the blueprint, and how many steps those have.

    `job` is the run's but for its limits; engine and settings are the run's, or others that take the same
    steps. Raises as `train` does.
    """
    shape = resolve_shape(job)
    with (
        user_errors(engine_name, job, run.out),
        set_up(job, shape, engine_name, settings, progress) as (engine, blueprint),
    ):
        checkpoint = restore.load_newest(engine, run.out)
        step = restore.step_of(checkpoint)
        if run.has_log:
            # Read after the checkpoint was: a run that is going on may have taken both further meanwhile.
            contents = read_update_log(run.out / restore.UPDATE_LOG)
            refuse_damaged(contents, run.out / restore.UPDATE_LOG)
            num_tensors = len(blueprint.parameter_shapes)
            step = restore.catch_up(engine, num_tensors, contents, checkpoint, run.out, progress)
        yield engine, blueprint, step


def _export_folder(out: Path, step: int) -> Path:
    return out / f"export-step-{step:08d}"


def _check_free(folder: Path) -> None:
    """Before the weights are rebuilt, not after it."""
    remedy = "name another place with --to"
    refuse_in_use(folder, remedy)
    check_writable(folder, is_folder=True, remedy=remedy)


@contextmanager
def set_up(
    job: Job,
    shape: ModelShape,
    engine_name: str,
    settings: Any,
    progress: Progress,
    trace: Path | None = None,
    sample: Batch | None = None,
) -> Iterator[tuple[Any, ModelBlueprint]]:
    """The engine with the weights that the run starts from, tried on `sample` beforehand; at the end its
    trace is written to `trace`, unless the set-up failed, and it is closed."""
    blueprint = make_blueprint(job, shape, sample)
    engine = load_engine(engine_name)(settings, context_of(job, progress, trace=trace is not None))
    if trace is not None and not isinstance(engine, TellsTrace):
        progress.print(f"note: {engine_name} keeps no trace")
        trace = None
    try:
        engine.setup(blueprint)
        blueprint.release()
        try:
            yield engine, blueprint
        finally:
            if trace is not None:
                write_trace(engine, trace)
    finally:
        engine.close()


@contextmanager
def user_errors(engine_name: str, job: Job, out: Path | None) -> Iterator[None]:
    """What an engine raises, as the `UserError` that it is; a defect stays what it is.

    A loss that is not finite is explained by the logs in `out`.
    """
    try:
        yield
    except NonFiniteLoss as error:
        history = [] if out is None else restore.history_of(out)
        why = why_not_finite(history, engine_name, job.dtype, error.sides)
        raise UserError(engine_name, f"{error}: {why.cause}", why.remedy) from None
    except (NotAvailable, InfeasiblePlan) as error:
        raise UserError(engine_name, str(error), "see 'lspzo-bench recommend' for what can run") from None
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        state, reason = classify(error)
        if state not in OUT_OF_MEMORY:
            raise
        raise UserError(
            engine_name,
            f"{OUT_OF_MEMORY[state]} ({reason})",
            "see 'lspzo-bench recommend' for methods that fit, or make --batch-size or --seq-len smaller",
        ) from None


def context_of(job: Job, progress: Progress, *, trace: bool = False) -> Context:
    return Context(
        device=prepare_torch(job.limits.vram_bytes),
        workload=job.workload,
        seed=job.seed,
        total_steps=job.steps,
        vram_bytes=job.limits.vram_bytes,
        host_bytes=usable_host_bytes(job.limits.host_bytes),
        trace=trace,
        progress=progress.update,
    )


def _run_steps(
    engine: Engine,
    data: Data,
    job: Job,
    out: Path,
    done: int,
    save_every: int,
    updates: UpdateLog | None,
    progress: Progress,
) -> None:
    """Steps `done` to the last, logged, with an evaluation before the first and after the last one."""

    def save(step: int) -> None:
        """A full checkpoint, unless the log is one and no other was asked for."""
        if updates is not None:
            updates.sync()  # or a power cut could leave a log that ends before the checkpoint
        if save_every or updates is None:
            restore.write_checkpoint(engine, out, step)

    path = out / restore.LOSS_LOG
    stop = _StopAfterStep()
    with _open_log(path) as log, on_first_signal(stop.ask):
        if done == 0:
            _evaluate(engine, data.evaluation, log, 0, progress)
        for step in range(done, job.steps):
            stats = engine.step(data.step_batches(step))
            if not math.isfinite(stats.loss):
                raise NonFiniteLoss(f"the loss of step {step} is {stats.loss}")
            # In this order: a kill between the two leaves a line too many, which resuming takes away.
            _write(log, step=step + 1, loss=stats.loss)
            if updates is not None:
                if not stats.updates:
                    raise RuntimeError(f"{engine.name} told no update of step {step}")
                updates.append(*stats.updates)
            progress.update("training", step + 1, job.steps, note=f"loss {stats.loss:.4g}")
            if stop.asked:
                save(step + 1)
                _stop(out, step + 1, job.steps, progress)
            if save_every and (step + 1) % save_every == 0:
                save(step + 1)
        _evaluate(engine, data.evaluation, log, job.steps, progress)
        if stop.asked:
            save(job.steps)
            _stop(out, job.steps, job.steps, progress)


def _stop(out: Path, step: int, total: int, progress: Progress) -> None:
    """Raises `KeyboardInterrupt`."""
    progress.print(f"stopped after step {step} of {total}; go on with --resume --out {out}")
    raise KeyboardInterrupt


class _StopAfterStep:
    """Whether the run was asked to stop: looked at between steps."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        self.asked = True


def _warn_of_no_compression(settings: object, shape: ModelShape, progress: Progress) -> None:
    """Say so where every core is as large as its matrix allows: little is gained then."""
    if not isinstance(settings, LspSettings) or not shape.matrices:
        return
    sides = [min(matrix.rows, matrix.columns) for matrix in shape.matrices]
    if all(
        core_size(matrix.rows, matrix.columns, settings) == side
        for matrix, side in zip(shape.matrices, sides, strict=True)
    ):
        progress.print(
            f"note: d={settings.d} hardly compresses {shape.name}, whose matrices are {max(sides)} at most "
            "on their smaller side; set a smaller one with --set d=..., or give --profile"
        )


def _note_if_flat(job: Job, engine_name: str, out: Path, progress: Progress) -> None:
    # Nothing can be learnt from random tokens: their loss is flat by itself.
    if job.data.train == "random":
        return
    why = why_flat(restore.history_of(out), engine_name, job.dtype)
    if why is not None:
        progress.print(f"note: {why}")


def _evaluate(engine: Engine, batches: list[Batch], log: IO[str], step: int, progress: Progress) -> None:
    if not batches:
        return
    result = engine.evaluate(batches)
    _write(log, step=step, eval_loss=result.loss, eval_accuracy=result.accuracy)
    when = f"after {step} steps" if step else "before training"
    progress.print(f"{when}: held-out loss {result.loss:.4g}, accuracy {result.accuracy:.1%}")


def _open_log(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def _write(log: IO[str], **values: float) -> None:
    try:
        log.write(json.dumps(values) + "\n")
        log.flush()
    except OSError as error:
        raise cannot_write(Path(log.name), error) from None
