"""What a training run leaves in its folder, and an engine brought back to where the run was.

The state of a run is its newest full checkpoint, or the weights it started from, and on top of that the
records of its update log, where its engine writes one. `log.jsonl` is for people and programs to read;
nothing is restored from it, and it is cut back to the step that was restored.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from engines.base import Engine, Update
from engines.errors import UserError
from engines.files.checksums import check_sums, write_sums
from engines.files.reading import exists, read_bytes
from engines.files.writing import settle, sync
from engines.settings.zeroth_order import MezoSettings
from harness.progress import Progress
from harness.records.job import Job
from harness.runs.divergence import Point
from harness.training.update_log import (
    Contents,
    LogOrigin,
    UpdateLog,
    cannot_write,
    check_belongs,
    damaged_copy,
    read_update_log,
    run_digest,
)
from profiles.documents import write_whole

LOSS_LOG, UPDATE_LOG, CHECKPOINTS = "log.jsonl", "updates.log", "checkpoints"
WRITING = "writing"
"""Below the checkpoints: the one that is not yet whole."""
REPLACED = "-replaced"
"""Ends the name of a checkpoint whose place another of the same step is about to take."""
_NAME = re.compile(rf"step-\d{{8,19}}({REPLACED})?")
SAMPLES = 1024
"""About as many elements of each tensor go into the fingerprint of the weights."""


class ReplayingEngine(Engine, Protocol):
    """What takes `engines.settings.zeroth_order.MezoSettings`: each of its steps is an `Update`."""

    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, right after `setup` or `load`, and go on after the last."""


def newest_checkpoint(out: Path) -> Path | None:
    """That of the greatest step, and one that is being replaced only if nothing has taken its place."""
    found = (path for path in (out / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name))
    return max(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)), default=None)


def step_of(checkpoint: Path | None) -> int:
    """Steps done in a checkpoint; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-").removesuffix(REPLACED))


def write_checkpoint(engine: Engine, out: Path, step: int) -> None:
    """Write beside the old checkpoint, then let the old one go: a kill at any moment leaves one.

    Raises `UserError` if it cannot be written; the old one stays.
    """
    folder = out / CHECKPOINTS
    temporary, final = folder / WRITING, folder / f"step-{step:08d}"
    replaced = final.with_name(final.name + REPLACED)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        engine.save(temporary)
        write_sums(temporary)
        settle(temporary)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # what a kill in the loop below left of it
            final.rename(replaced)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(final, error) from None
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_newest(engine: Engine, out: Path) -> Path | None:
    """Load the newest checkpoint of a run, which may be going on; `None` without one.

    Raises `UserError` if it is damaged, before `engine` holds any of it, or not one of this engine.
    """
    while True:
        checkpoint = newest_checkpoint(out)
        if checkpoint is None:
            return None
        try:
            check_sums(checkpoint, "restore it, or delete it to go on from what else there is")
            engine.load(checkpoint)
            return checkpoint
        except (
            OSError,
            UserError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            if newest_checkpoint(out) != checkpoint:
                continue  # the run has put a newer one in its place
            if isinstance(error, UserError):
                raise
            why = f"cannot be read ({type(error).__name__}: {error})"
            raise UserError(str(checkpoint), why, "restore it, or delete it") from None


def start(
    engine: Engine, num_tensors: int, job: Job, settings: object, out: Path, step: int, progress: Progress
) -> UpdateLog | None:
    """An empty log of updates to the weights that `engine` holds after `step` steps.

    `None` for an engine whose steps are no `Update`. Raises `UserError` if it cannot be written.
    """
    if not isinstance(settings, MezoSettings):
        return None
    origin = LogOrigin(
        seed=job.seed % 2**64,
        start_step=step,
        run_sha256=run_digest(job, settings),
        weights_sha256=fingerprint(engine, num_tensors, progress),
        queries=settings.updates_per_step(job.workload.examples_per_step),
    )
    return UpdateLog.create(out / UPDATE_LOG, origin)


def resume(
    engine: Any, num_tensors: int, job: Job, settings: object, out: Path, progress: Progress
) -> tuple[int, UpdateLog | None]:
    """Bring `engine`, which has been set up, to where the run in `out` was, and cut its logs to that step.

    Returns how many steps are done, and the log to go on with, for an engine that has one.
    Raises `UserError` if the log belongs to another run, is in use, or does not reach what is there.
    """
    log = contents = None
    if isinstance(settings, MezoSettings) and exists(out / UPDATE_LOG):
        log, contents = UpdateLog.reopen(out / UPDATE_LOG)
        check_belongs(contents, job, settings, log.path)
    try:
        checkpoint = load_newest(engine, out)
        step = step_of(checkpoint)
        if contents is not None and log is not None:
            step = catch_up(engine, num_tensors, contents, checkpoint, out, progress)
            if contents.damaged:
                progress.print(
                    f"{log.path} is damaged behind step {contents.end_step}: the steps after it are taken "
                    f"again; the file as it was is {damaged_copy(log.path).name}"
                )
            elif contents.torn_bytes:
                progress.print(f"cut off {contents.torn_bytes} bytes at the end of {log.path}: not whole")
        if contents is None or contents.end_step < step:
            # A run of before there were logs, or a log that was lost: all of it is in the checkpoint.
            if log is not None:
                log.close()
            log = start(engine, num_tensors, job, settings, out, step, progress)
        anything = checkpoint is not None or step > 0
        progress.print(
            f"resuming after step {step}" if anything else "no checkpoint: starting from the beginning"
        )
        _cut_loss_log(out / LOSS_LOG, step)
    except BaseException:
        if log is not None:
            log.close()
        raise
    return step, log


def catch_up(
    engine: ReplayingEngine,
    num_tensors: int,
    contents: Contents,
    checkpoint: Path | None,
    out: Path,
    progress: Progress,
) -> int:
    """Replay what the log has beyond the checkpoint that `engine` holds; how many steps are done then.

    Without a checkpoint the engine holds the weights it was set up with. Raises `UserError` if those are
    not the ones that the log starts from, or if it starts later than the checkpoint.
    """
    origin, done = contents.origin, step_of(checkpoint)
    if origin.start_step > done:
        raise UserError(
            str(out / UPDATE_LOG),
            f"goes on from a checkpoint of step {origin.start_step}, which is not there",
            "put that checkpoint back, or start anew with another --out",
        )
    if checkpoint is None and fingerprint(engine, num_tensors, progress) != origin.weights_sha256:
        raise UserError(
            str(out / UPDATE_LOG),
            "starts from other weights than the model has here and now",
            "put the model back as it was, or use the kind of device that made its random weights",
        )
    total = (contents.end_step - done) * origin.queries
    if total > 0:
        engine.replay(_counted(contents.updates(done), total, progress))
        engine.synchronize()
    return max(done, contents.end_step)


def fingerprint(engine: Engine, num_tensors: int, progress: Progress) -> bytes:
    """SHA-256 of names, shapes, dtypes and a sample of each tensor: fine-tuning changes nearly every element.

    Not of every byte: that would take a minute for 13 billion parameters.
    """
    digest = hashlib.sha256()
    for number, (name, tensor) in enumerate(engine.weights()):
        progress.update("hashing a sample of the weights", number + 1, num_tensors)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].contiguous()
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()


def history_of(out: Path) -> list[Point]:
    """Loss and update of each step in a run's logs, as far as they go."""
    updates: dict[int, tuple[Update, ...]] = {}
    if exists(out / UPDATE_LOG):
        contents = read_update_log(out / UPDATE_LOG)
        for update in contents.updates(contents.origin.start_step):
            updates[update.step] = (*updates.get(update.step, ()), update)
    return [
        Point(loss=values["loss"], updates=updates.get(values["step"] - 1, ()))
        for _, values in _lines(out / LOSS_LOG)
        if "loss" in values
    ]


def evaluations_of(path: Path) -> Iterator[dict[str, Any]]:
    """The evaluations in a `log.jsonl`, each with its `step`, in their order."""
    for _, values in _lines(path):
        if "eval_loss" in values:
            yield values


def _counted(updates: Iterable[Update], total: int, progress: Progress) -> Iterator[Update]:
    for number, update in enumerate(updates, start=1):
        yield update
        progress.update("replaying updates", number, total)


def _cut_loss_log(path: Path, step: int) -> None:
    """Take away the lines that the steps after `step` will write again."""
    kept = [
        line
        for line, values in _lines(path)
        if step and (values["step"] < step or (values["step"] == step and "eval_loss" not in values))
    ]
    if exists(path):
        write_whole(path, "".join(line + "\n" for line in kept))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of `log.jsonl` and their values, without those that a kill cut off or that are damaged."""
    if not exists(path):
        return
    for line in read_bytes(path, "log").decode("utf-8", "replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        sound = isinstance(values, dict) and type(values.get("step")) is int
        if sound and type(values.get("loss", 0.0)) in (int, float):
            yield line, values
