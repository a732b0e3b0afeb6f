"""Whether a run's folder has room for what the run will write, before its first step.

A run that cannot save what it learns should not begin. The sizes are from the shape of the model and the
costs of the method (`engines.costs`): nothing is read, and nothing is written.
"""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Any

from engines.costs.table import traffic
from engines.errors import UserError
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape
from harness.models.export import SHARD_BYTES
from harness.records.job import Job
from harness.training.restore import CHECKPOINTS
from harness.training.update_log import RECORD_BYTES
from profiles.units import format_bytes

LINE_BYTES = 100
"""Of a step in `log.jsonl`, generously."""
SMALL_FILES_BYTES = 2**20
"""Configuration, tokenizer, what the run is."""


def needed(shape: ModelShape, job: Job, engine: str, settings: Any, save_every: int) -> dict[str, int]:
    """Bytes by what they are for: the export, the checkpoints that lie there at once, the logs."""
    weights = BYTES_PER_ELEMENT[job.dtype] * shape.parameters
    zeroth_order = isinstance(settings, MezoSettings)
    checkpoint = weights
    if not zeroth_order:
        cost = traffic(engine, shape, job.workload, settings)
        checkpoint += cost.gpu_memory_bytes.get("optimizer", 0) + cost.host_memory_bytes.get("optimizer", 0)
    # The newest stays until the next is whole. Where a log is the checkpoint, others are only written if
    # asked for; where there is none, one is written when the run is stopped.
    count = min(2, math.ceil(job.steps / save_every)) if save_every else int(not zeroth_order)
    examples = job.workload.examples_per_step
    records = settings.updates_per_step(examples) if isinstance(settings, MezoSettings) else 0
    return {
        "the model": weights,
        "checkpoints": count * checkpoint,
        "the best model": 2 * weights if job.eval_every else 0,
        "logs": job.steps * (LINE_BYTES + records * RECORD_BYTES),
    }


def check_free_space(
    out: Path, shape: ModelShape, job: Job, engine: str, settings: Any, save_every: int
) -> None:
    """Raises `UserError` if the disk of `out`, which is there, or the limit on sizes of files is too small.

    What the run's earlier steps have written is not asked for again.
    """
    parts = needed(shape, job, engine, settings, save_every)
    total = sum(parts.values()) + SMALL_FILES_BYTES
    try:
        disk = os.statvfs(out)
        there = sum(path.lstat().st_size for path in (out / CHECKPOINTS).rglob("*"))
    except OSError:
        return  # then writing says what is wrong
    free = disk.f_bavail * disk.f_frsize + there
    written = ", ".join(f"{format_bytes(size)} for {name}" for name, size in parts.items() if size)
    if free < total:
        raise UserError(
            str(out),
            f"{format_bytes(free)} are free, the run writes {written}",
            "free space or name another --out",
        )
    if disk.f_files and disk.f_favail < _FEW_FILES:
        raise UserError(
            str(out),
            f"the disk takes {disk.f_favail} more files (no inodes)",
            "delete some or name another --out",
        )
    largest = min(parts["the model"], SHARD_BYTES)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < largest:
        raise UserError(
            str(out),
            f"files may have {format_bytes(limit)} here, and one of {format_bytes(largest)} is written",
            "raise the limit (ulimit -f)",
        )


_FEW_FILES = 32
"""More than a run has at once beside shards of its model."""
