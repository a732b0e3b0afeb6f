"""Fine-tune for real with one engine, and export a Hugging Face folder.

What lies in `<out>`: `job.toml` and `engine.json` (what is trained, and how), `log.jsonl` (a line per
step, `step` being the number of steps done, and a line per evaluation), `checkpoints/` (the newest one),
`model/` (the export).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Self

from safetensors import SafetensorError

from engines import load_engine
from engines.base import (
    Batch,
    Context,
    Engine,
    InfeasiblePlan,
    ModelShape,
    NonFiniteLoss,
    NotAvailable,
    UserError,
)
from engines.blocks import TORCH_DTYPE
from engines.costs.lsp import core_size
from engines.settings import LspSettings, parse_settings
from harness.data import Data, make_data
from harness.job import Job, load_job, save_job
from harness.models import export_model, make_blueprint
from harness.shapes import resolve_shape
from harness.show import Progress
from harness.worker import classify, prepare_torch, usable_host_bytes
from profiles.documents import read_document, to_json, write_whole

SCHEMA_VERSION = 1
"""Of engine.json. 1: first version (0.1.0)."""

OUT_OF_MEMORY = {
    "oom_gpu": "ran out of GPU memory",
    "oom_host": "ran out of host memory",
    "pinned_limit": "could not pin host memory",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Which engine trains, with all of its settings."""

    engine: str
    settings: dict[str, str | int | float | bool]
    schema_version: int = SCHEMA_VERSION


def train(
    job: Job,
    engine_name: str,
    settings: Mapping[str, object],
    out: Path,
    *,
    save_every: int,
    resume: bool,
    progress: Progress,
) -> Path:
    """Train `job.steps` steps and return the exported folder.

    `settings` are those of the engine that differ from its defaults. A run that is resumed takes the same
    job and engine, keeps its settings, and ends with the same weights as one that was never stopped. The
    first Ctrl-C ends the step, saves a checkpoint and raises `KeyboardInterrupt`; a second one does not wait.

    Raises `UserError` if `out` is in use or cannot be written, the job differs, the engine cannot run
    here, memory runs out, or the loss is not finite. Checkpoints are kept.
    """
    typed = parse_settings(engine_name, settings)
    typed = _claim(job, Method(engine=engine_name, settings=asdict(typed)), out, resume)
    shape = resolve_shape(job)
    _warn_of_no_compression(typed, shape, progress)
    data = make_data(job, shape)
    progress.print(data.describe())
    blueprint = make_blueprint(job, shape)
    try:
        engine = load_engine(engine_name)(typed, _context(job, progress))
        try:
            engine.setup(blueprint)
            blueprint.release()
            done = _restore(engine, out, progress) if resume else 0
            _run_steps(engine, data, job, out, done, save_every, progress)
            folder = out / "model"
            if folder.exists():
                shutil.rmtree(folder)
            export_model(blueprint, engine.weights(), TORCH_DTYPE[job.dtype], folder)
            return folder
        finally:
            engine.close()
    except NonFiniteLoss as error:
        remedy = "lower learning_rate with --set" + ("" if job.dtype == "fp32" else ", or use --dtype fp32")
        raise UserError(engine_name, str(error), remedy) from None
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


def _context(job: Job, progress: Progress) -> Context:
    return Context(
        device=prepare_torch(job.limits.vram_bytes),
        workload=job.workload,
        seed=job.seed,
        total_steps=job.steps,
        vram_bytes=job.limits.vram_bytes,
        host_bytes=usable_host_bytes(job.limits.host_bytes),
        progress=progress.update,
    )


def _run_steps(
    engine: Engine, data: Data, job: Job, out: Path, done: int, save_every: int, progress: Progress
) -> None:
    """Steps `done` to the last, logged, with an evaluation before the first and after the last one."""
    path = out / "log.jsonl"
    with _open_log(path) as log, _StopAfterStep() as stop:
        if done == 0:
            _evaluate(engine, data.evaluation, log, 0, progress)
        for step in range(done, job.steps):
            stats = engine.step(data.step_batches(step))
            if not math.isfinite(stats.loss):
                raise NonFiniteLoss(f"the loss of step {step} is {stats.loss}")
            _write(log, step=step + 1, loss=stats.loss)
            progress.update("training", step + 1, job.steps, note=f"loss {stats.loss:.4g}")
            if stop.asked:
                _save_and_stop(engine, out, step + 1, job.steps, progress)
            if save_every and (step + 1) % save_every == 0:
                _checkpoint(engine, out, step + 1)
        _evaluate(engine, data.evaluation, log, job.steps, progress)
        if stop.asked:
            _save_and_stop(engine, out, job.steps, job.steps, progress)


def _save_and_stop(engine: Engine, out: Path, step: int, total: int, progress: Progress) -> None:
    """Raises `KeyboardInterrupt`."""
    _checkpoint(engine, out, step)
    progress.print(f"stopped after step {step} of {total}; go on with --resume --out {out}")
    raise KeyboardInterrupt


class _StopAfterStep(AbstractContextManager["_StopAfterStep"]):
    """Turns the first Ctrl-C into a question to be asked between steps; the second one interrupts at once.

    Signals come to the main thread only, so in another one it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _warn_of_no_compression(settings: object, shape: ModelShape, progress: Progress) -> None:
    """Say so where every core is as large as its matrix allows: little is gained then."""
    if not isinstance(settings, LspSettings) or settings.projector == "identity" or not shape.matrices:
        return
    sides = [min(matrix.rows, matrix.columns) for matrix in shape.matrices]
    if all(core_size(matrix, settings.d) == side for matrix, side in zip(shape.matrices, sides, strict=True)):
        progress.print(
            f"note: d={settings.d} hardly compresses {shape.name}, whose matrices are {max(sides)} at most "
            "on their smaller side; set a smaller one with --set d=..., or give --profile"
        )


def _claim(job: Job, method: Method, out: Path, resume: bool) -> Any:
    """Take `out` for this run, or check that it is its own; the settings to train with."""
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(str(out), "is not an empty folder", "name another --out, or add --resume")
        write_whole(out / "engine.json", to_json(method))
        save_job(job, out / "job.toml")
        return parse_settings(method.engine, method.settings)
    if not (out / "job.toml").exists():
        raise UserError(str(out), "holds no run to resume", "leave out --resume, or name its --out")
    before = replace(load_job(out / "job.toml"), limits=job.limits)
    changed = [field.name for field in fields(Job) if getattr(before, field.name) != getattr(job, field.name)]
    if changed:
        raise UserError(
            "--resume",
            f"the job differs from the earlier one in {', '.join(changed)}",
            "give the same flags, or name another --out",
        )
    earlier = read_document(out / "engine.json", Method, SCHEMA_VERSION, "record of a training run")
    if earlier.engine != method.engine:
        raise UserError(
            "--resume", f"the earlier engine was {earlier.engine}, not {method.engine}", "give the same flags"
        )
    return parse_settings(earlier.engine, earlier.settings)


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
        raise _cannot_write(path, error) from None


def _write(log: IO[str], **values: float) -> None:
    try:
        log.write(json.dumps(values) + "\n")
        log.flush()
    except OSError as error:
        raise _cannot_write(Path(log.name), error) from None


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(str(path), f"cannot be written ({reason})", "free space, then go on with --resume")


def _checkpoint(engine: Engine, out: Path, step: int) -> None:
    """Write beside the old checkpoint, then let the old one go: a kill at any moment leaves one.

    Raises `UserError` if it cannot be written; the old one stays.
    """
    folder = out / "checkpoints"
    temporary, final = folder / "writing", folder / f"step-{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        engine.save(temporary)
        for path in temporary.iterdir():
            _sync(path)
        if final.exists():  # of a run that was killed between two steps below
            shutil.rmtree(final)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(final, error) from None
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def _sync(path: Path) -> None:
    """To the disk, or a power cut after the rename would leave an empty file under a final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _restore(engine: Engine, out: Path, progress: Progress) -> int:
    """Load the newest checkpoint and cut the log back to it; how many steps it has done, 0 without one."""
    found = sorted((out / "checkpoints").glob("step-*"))
    step = 0
    if found:
        engine.load(found[-1])
        step = int(found[-1].name.removeprefix("step-"))
    progress.print(f"resuming after step {step}" if found else "no checkpoint: starting from the beginning")
    path = out / "log.jsonl"
    if path.exists():
        write_whole(path, "".join(line + "\n" for line in _lines_until(path, step)))
    return step


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of the log that the steps to come will not write again."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break  # the run was killed while it wrote this line, its last
        is_evaluation = "eval_loss" in values
        if step and (values["step"] < step or (values["step"] == step and not is_evaluation)):
            kept.append(line)
    return kept
