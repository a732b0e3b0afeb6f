"""Fine-tune for real with one engine, and export a Hugging Face folder.

What lies in `<out>` stands in `harness.training.run_folder`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engines import entry, load_engine
from engines.base import Batch, Context, Evaluation, SupportsTrace
from engines.errors import InfeasiblePlan, NonFiniteLoss, NotAvailable, UserError
from engines.files.checksums import check_sums
from engines.files.locks import locked_folder
from engines.files.writing import clear_leftovers
from engines.model.blocks import TORCH_DTYPE
from engines.settings.given import GivenSettings
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import compresses
from engines.shapes import ModelShape
from engines.world import ALONE, World
from harness.data.batches import Data, make_data
from harness.models.blueprint import ModelBlueprint, export_model, make_blueprint
from harness.models.candidates import candidates_of
from harness.models.export import holds_something, refuse_in_use
from harness.models.tokenizers import load_tokenizer
from harness.progress import Progress
from harness.records.environment import gpu_notes
from harness.records.job import Job
from harness.records.metrics import metrics_of
from harness.resolve import resolve_shape
from harness.runs.divergence import why_flat, why_not_finite
from harness.runs.end_states import OUT_OF_MEMORY, classify
from harness.runs.governance_facts import governance_facts
from harness.runs.limits import prepare_torch, usable_host_bytes
from harness.runs.ranks import check_gpus
from harness.runs.worker import TRACE, write_trace
from harness.training import restore
from harness.training.free_space import check_free_space
from harness.training.leader import check_same_weights, leading, share_state
from harness.training.led_engine import LedEngine
from harness.training.run_folder import (
    MODEL,
    TrainingRun,
    claim,
    given_back_if_refused,
    method_of,
    read_run,
    refuse_folder_in_use,
)
from harness.training.steps import SUMMARY, Course, run_steps
from harness.training.update_log import read_update_log, refuse_damaged
from profiles.documents import check_writable, to_json, write_whole


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
    board: bool = False,
    length: Length | None = None,
) -> Path:
    """Train `job.steps` steps, or as many as `length` makes, and return the exported folder.

    A run that is resumed takes the same job and engine, keeps its settings, and ends with the same weights as
    one that was never stopped; one that is finished stays as it is. The first of `harness.signals.ENDING`
    ends the step, sees to it that the run can be resumed and raises `KeyboardInterrupt`; a second does not
    wait.

    Raises `UserError` if `out` is in use or cannot be written or has no room for what the run writes, the job
    differs, the engine cannot run here, memory runs out, or the loss is not finite. Checkpoints are kept; a
    new run that has logged nothing leaves nothing.
    """
    check_gpus(job.limits, [engine_name])
    shape = resolve_shape(job)  # before the folder is claimed: a mistake in the job must leave it free
    if length is not None:
        job = replace(job, steps=length.steps(job, make_data(job, shape).num_examples))
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
        _train(
            job, shape, engine_name, typed, out, progress, save_every=save_every, resume=resume, trace=trace,
            board=board,
        )  # fmt: skip
    _note_if_flat(job, engine_name, out, progress)
    return folder


def _train(
    job: Job,
    shape: ModelShape,
    engine_name: str,
    typed: Any,
    out: Path,
    progress: Progress,
    *,
    save_every: int,
    resume: bool,
    trace: bool,
    board: bool,
) -> None:
    """The steps that are left, and the export, in a folder that is claimed."""
    with given_back_if_refused(out, resume):
        check_free_space(out, shape, job, engine_name, typed, save_every)
        _warn_of_no_compression(typed, shape, progress)
        data = data_told(job, shape, progress)
        judge = _judge_of(job, shape, data)
        kept, sample = out / TRACE if trace else None, data.step_batches(0)[0]
        with (
            leading(job, engine_name, typed, out) as world,
            user_errors(engine_name, job, out),
            set_up(job, shape, engine_name, typed, progress, kept, sample, world) as (own_engine, blueprint),
        ):
            # Steps of a zeroth-order method are updates, which the others replay.
            is_led = world.size > 1 and entry(engine_name).order == "first"
            engine: Any = LedEngine(own_engine, world) if is_led else own_engine
            num_tensors = len(blueprint.parameter_shapes)
            # Again: blocks on disk have their room now, maybe of the same disk.
            check_free_space(out, shape, job, engine_name, typed, save_every)
            check_same_weights(world, own_engine, num_tensors, progress)
            if resume:
                done, updates = restore.resume(engine, num_tensors, job, typed, out, progress)
            else:
                done, updates = 0, restore.start(engine, num_tensors, job, typed, out, 0, progress)
            share_state(world, out, done, is_loaded=is_led)

            def export(folder: Path) -> None:
                export_model(blueprint, engine.weights(), TORCH_DTYPE[job.dtype], folder)

            with closing(updates) if updates is not None else nullcontext():
                course = Course(
                    job=job, data=data, out=out, save_every=save_every, updates=updates, progress=progress,
                    judge=judge, export=export, board=board, world=world,
                )  # fmt: skip
                run_steps(engine, course, done)
            # Before the model, which says that the run is done.
            facts = governance_facts(job, typed, out, SUMMARY, restore.LOSS_LOG)
            summary = course.summary(engine_name, facts)
            write_whole(out / SUMMARY, to_json(summary))
            try:
                export(out / MODEL)
            except Exception:
                if updates is None and restore.step_of(restore.newest_checkpoint(out)) < course.done:
                    # Else the trained weights would end with this process.
                    restore.write_checkpoint(engine, out, course.done)
                raise
            progress.print(summary.one_line())


def _judge_of(job: Job, shape: ModelShape, data: Data) -> Callable[[Evaluation], dict[str, float]]:
    """What gives the metrics of an evaluation: what they are follows from the model's head and the data."""
    classes: Sequence[int] = ()
    is_bytes = False
    if job.data.train != "random":
        tokenizer = load_tokenizer(job.model, shape.vocabulary)
        is_bytes = tokenizer.name == "bytes"
        if job.data.template:
            words = candidates_of(job.data.template, job.data.labels, tokenizer, shape.head)
            classes = words.labels(shape.head)
    return partial(
        metrics_of, head=shape.head, candidates=classes, is_regression=data.is_regression, is_bytes=is_bytes
    )


def data_told(job: Job, shape: ModelShape, progress: Progress) -> Data:
    """The data of `job`, and told: how it was read, what is worth knowing of the GPU. Raises `UserError`."""
    for note in gpu_notes():
        progress.print(f"note: {note}")
    data = make_data(job, shape)
    for line in (*data.readings, data.describe()):
        progress.print(line)
    return data


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How long a run is, in examples: the steps follow from the data."""

    epochs: float | None = None
    examples: int | None = None
    """Training sequences; goes before `epochs`."""

    def steps(self, job: Job, num_examples: int | None) -> int:
        """Whole steps that see at least so many. Raises `UserError` for data without end."""
        wanted = self.examples
        if wanted is None:
            if num_examples is None:
                raise UserError("--epochs", "random tokens have no end", "use --steps or --examples")
            wanted = math.ceil((self.epochs or 0.0) * num_examples)
        return max(1, math.ceil(wanted / (job.batch_size * job.accumulation)))


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
    world: World = ALONE,
) -> Iterator[tuple[Any, ModelBlueprint]]:
    """The engine with the weights that the run starts from, tried on `sample` beforehand; at the end its
    trace is written to `trace`, unless the set-up failed, and it is closed."""
    blueprint = make_blueprint(job, shape, sample)
    engine = load_engine(engine_name)(
        settings, context_of(job, progress, trace=trace is not None, world=world)
    )
    if trace is not None and not isinstance(engine, SupportsTrace):
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
        why = why_not_finite(history, engine_name, job.dtype, error.losses)
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


def context_of(job: Job, progress: Progress, *, trace: bool = False, world: World = ALONE) -> Context:
    return Context(
        device=prepare_torch(job.limits.vram_bytes, world.local_size),
        workload=job.workload,
        seed=job.seed,
        total_steps=job.steps,
        vram_bytes=job.limits.vram_bytes,
        host_bytes=usable_host_bytes(job.limits.host_bytes) // world.local_size,
        trace=trace,
        progress=progress.update,
        world=world,
    )


def _warn_of_no_compression(settings: object, shape: ModelShape, progress: Progress) -> None:
    """Say so where every core is as large as its matrix allows: little is gained then."""
    if not isinstance(settings, LspSettings) or not shape.matrices or compresses(shape, settings):
        return
    largest = max(min(matrix.rows, matrix.columns) for matrix in shape.matrices)
    progress.print(
        f"note: d={settings.d} hardly compresses {shape.name}, whose matrices are {largest} at most on their "
        "smaller dimension; set a smaller one with --set d=..., or give --profile"
    )


def _note_if_flat(job: Job, engine_name: str, out: Path, progress: Progress) -> None:
    # Nothing can be learnt from random tokens: their loss is flat by itself.
    if job.data.train == "random":
        return
    why = why_flat(restore.history_of(out), engine_name, job.dtype)
    if why is not None:
        progress.print(f"note: {why}")
