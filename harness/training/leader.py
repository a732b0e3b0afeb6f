"""Training with several processes, as the one that leads sees it: it alone evaluates, writes and talks.

The others (`harness.training.follower`) take its steps with it. What they begin from they are told: a
checkpoint, where there is one, and the update log, which is a few bytes a step; so a run goes on with another
number of processes than it had, on machines that do not see its folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.errors import PeerLost, UserError
from engines.files.locks import own_folder
from engines.files.reading import exists
from engines.transfer.clock import now_s
from engines.transfer.process_group import leave, meet
from engines.world import ALONE, World
from harness.progress import Progress
from harness.records.job import Job
from harness.runs.processes import Group, of_rank
from harness.runs.ranks import RankPlace, check_alike, places, what_to_agree_on
from harness.signals import named_signal
from harness.training import restore
from harness.training.led_engine import END, STATE
from harness.training.run_folder import Method, method_of
from profiles.documents import to_json, write_whole

FOLLOW = "follow.json"
"""What the others are to do, in a folder of the run's own that is gone after it."""
ENDING_S = 5.0
"""For which the end of a process is waited for that others miss already."""
LOOK_S, HANGING_S = 1.0, 60.0
"""Between two looks whether the others are there, and for how long this one may go on without them."""
USAGE = 2
"""Exit code of an error that is told in one line."""
MODULE = "harness.training.follower"


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """What a process that follows needs to know beforehand."""

    job: Job
    method: Method


@contextmanager
def leading(job: Job, engine_name: str, settings: Any, out: Path) -> Iterator[World]:
    """The other ranks of this machine started, and all ranks met; alone, nothing is done.

    At the end the others are gone, however it comes. Raises `UserError` where a rank does not come, is unlike
    this one, or ends before the run does.
    """
    if job.limits.ranks == 1:
        yield ALONE
        return
    with own_folder() as work:
        ranks = places(job.limits, work)
        if ranks[0].rank != 0:
            raise UserError("NODE_RANK", "is not 0: this process does not lead", "start it with NODE_RANK=0")
        write_whole(work / FOLLOW, to_json(Following(job=job, method=method_of(engine_name, settings))))
        others = Group(work, ranks[1:], None, MODULE) if ranks[1:] else None
        remedy = f"go on with --resume --out {shlex.quote(str(out))}, with as many GPUs as there are"
        try:
            with _watched(others, work, remedy):
                world = met(ranks[0], job, engine_name, settings)
                yield world
            world.broadcast(END)
        except PeerLost:
            raise who_ended(others, work, remedy) from None
        finally:
            leave()
            if others is not None:
                others.finish({})


@contextmanager
def _watched(others: Group | None, work: Path, remedy: str) -> Iterator[None]:
    """While the run goes on: where another rank of this machine has ended and this one still waits for it, in
    what cannot be interrupted (NCCL's kernels wait for hours), the process says so and ends."""
    over = threading.Event()

    def watch() -> None:
        workers = others.workers if others is not None else []
        while not over.wait(LOOK_S):
            if any(worker.exit_status() is not None for worker in workers) and not over.wait(HANGING_S):
                sys.stderr.write(f"error: {who_ended(others, work, remedy)}\n")
                shutil.rmtree(work, ignore_errors=True)
                os._exit(USAGE)  # as abrupt as a kill, after which a run can go on

    thread = threading.Thread(target=watch, name="other-ranks", daemon=True)
    if others is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if others is not None:
            thread.join()


def met(place: RankPlace, job: Job, engine_name: str, settings: Any) -> World:
    """All ranks, once they are there and alike. Raises `UserError`."""
    for name, value in place.environment.items():
        if name.startswith("GLOO_"):
            os.environ.setdefault(name, value)
    world = meet(place.where, place.rank, place.size, place.local_rank, place.local_size)
    check_alike(world, what_to_agree_on(job, engine_name, asdict(settings)))
    return world


def check_same_weights(world: World, engine: Any, num_tensors: int, progress: Progress) -> None:
    """Before anything is loaded. Raises `UserError`, on all ranks, where one has other weights than the
    first."""
    if world.size == 1:
        return
    found = world.exchange(restore.fingerprint(engine, num_tensors, progress))
    for rank, each in enumerate(found):
        if each != found[0]:
            raise UserError(
                f"rank {rank}", "starts from other weights than rank 0", "give every machine the same model"
            )


def share_state(world: World, out: Path, done: int, *, is_loaded: bool) -> None:
    """Tell the others from where to go on: after `done` steps of the run in `out`. They are there then.
    `is_loaded`: its checkpoint they have loaded already, when this rank did."""
    if world.size == 1:
        return
    checkpoint = None if is_loaded else restore.newest_checkpoint(out)
    at = None if checkpoint is None else str(checkpoint.resolve())
    world.broadcast(STATE)
    world.broadcast(json.dumps({"done": done, "checkpoint": at}).encode("utf-8"))
    log = out / restore.UPDATE_LOG
    world.broadcast(log.read_bytes() if exists(log) else b"")
    world.barrier()


def who_ended(others: Group | None, work: Path, remedy: str) -> UserError:
    """The first of this machine's ranks that has ended, and its last line."""
    workers = others.workers if others is not None else []
    until_s = now_s() + ENDING_S
    while all(worker.end() is None for worker in workers) and now_s() < until_s:
        time.sleep(0.05)  # its connections go before it does
    for number, worker in enumerate(workers):
        code = worker.end()
        if code is None:
            continue
        lines = (work / of_rank("log", number)).read_text(encoding="utf-8", errors="replace").splitlines()
        last = lines[-1].strip()[:120] if lines else "it said nothing"
        why = f"was killed by {named_signal(-code)}" if code < 0 else f"ended: {last}"
        return UserError(f"rank {number + 1}", why, remedy)
    return UserError("a rank of another machine", "ended, or did not answer", remedy)
