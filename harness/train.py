"""Fine-tune for real with one engine, and export a Hugging Face folder.

`<out>/log.jsonl` holds every step, `<out>/checkpoints/` the newest checkpoint, `<out>/model/` the export.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from engines import load_engine
from engines.base import Context, InfeasiblePlan, NonFiniteLoss, NotAvailable, UserError
from engines.blocks import TORCH_DTYPE
from engines.settings import parse_settings
from harness.data import make_data
from harness.job import Job, load_job, save_job
from harness.models import export_model, make_blueprint
from harness.shapes import resolve_shape
from harness.show import Progress


def train(
    job: Job, engine_name: str, out: Path, *, save_every: int, resume: bool, progress: Progress
) -> Path:
    """Train `job.steps` steps and return the exported folder.

    A run that is resumed takes the same job and ends with the same weights as one that was never
    stopped. Raises `UserError` if `out` is in use, the job differs, the engine cannot run here, or
    the loss is not finite.
    """
    _claim(job, out, resume)
    shape = resolve_shape(job)
    cuda = torch.cuda.is_available()
    if cuda and job.limits.vram_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, job.limits.vram_bytes / torch.cuda.get_device_properties(0).total_memory)
        )
    context = Context(
        device="cuda:0" if cuda else "cpu",
        workload=job.workload,
        seed=job.seed,
        total_steps=job.steps,
        vram_bytes=job.limits.vram_bytes,
        progress=progress.update,
    )
    data = make_data(job, shape)
    blueprint = make_blueprint(job, shape)
    settings = parse_settings(engine_name, job.settings.get(engine_name, {}))
    engine = load_engine(engine_name)(settings, context)
    try:
        engine.setup(blueprint)
        blueprint.release()
        done = _restore(engine, out) if resume else 0
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            if done == 0 and data.evaluation:
                _write(log, step=0, **_evaluated(engine, data))
            for step in range(done, job.steps):
                stats = engine.step(data.step_batches(step))
                if not math.isfinite(stats.loss):
                    raise NonFiniteLoss(f"the loss of step {step} is {stats.loss}")
                _write(log, step=step + 1, loss=stats.loss)
                progress.update("train", step + 1, job.steps, note=f"loss {stats.loss:.4g}")
                if save_every and (step + 1) % save_every == 0:
                    _checkpoint(engine, out, step + 1)
            if data.evaluation:
                _write(log, step=job.steps, **_evaluated(engine, data))
        folder = out / "model"
        if folder.exists():
            shutil.rmtree(folder)
        export_model(blueprint, engine.weights(), TORCH_DTYPE[job.dtype], folder)
        return folder
    except NonFiniteLoss as error:
        raise UserError(
            engine_name, str(error), "lower learning_rate with --set, or use --dtype fp32"
        ) from None
    except (NotAvailable, InfeasiblePlan) as error:
        raise UserError(engine_name, str(error), "see 'lspzo-bench recommend' for what can run") from None
    except torch.OutOfMemoryError:
        raise UserError(
            engine_name, "ran out of GPU memory", "see 'lspzo-bench recommend' for methods that fit"
        ) from None
    finally:
        engine.close()


def _claim(job: Job, out: Path, resume: bool) -> None:
    known = out / "job.toml"
    if resume:
        if not known.exists():
            raise UserError(str(out), "holds no run to resume", "leave out --resume")
        before = replace(load_job(known), limits=job.limits)
        changed = [
            field.name for field in fields(Job) if getattr(before, field.name) != getattr(job, field.name)
        ]
        if changed:
            raise UserError(
                "--resume",
                f"the job differs from the earlier one in {', '.join(changed)}",
                "give the same flags",
            )
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(str(out), "is not empty", "name another --out, or add --resume")
    save_job(job, known)


def _evaluated(engine: Any, data: Any) -> dict[str, float]:
    result = engine.evaluate(data.evaluation)
    return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}


def _write(log: Any, **values: float) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()


def _checkpoint(engine: Any, out: Path, step: int) -> None:
    """Write beside the old checkpoint, then let the old one go: a kill at any moment leaves one."""
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    temporary = folder / "writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    engine.save(temporary)
    (temporary / "step").write_text(str(step))
    final = folder / f"step-{step:08d}"
    temporary.rename(final)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other)


def _restore(engine: Any, out: Path) -> int:
    """Load the newest checkpoint and cut the log back to it; 0 if there is none."""
    found = sorted((out / "checkpoints").glob("step-*")) if (out / "checkpoints").exists() else []
    step = 0
    if found:
        engine.load(found[-1])
        step = int((found[-1] / "step").read_text())
    log = out / "log.jsonl"
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step and step]
        log.write_text("".join(line + "\n" for line in kept))
    return step
