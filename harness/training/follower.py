"""A process that takes the steps of a training run with the one that leads it: `harness.training.leader`.

`python -P -m harness.training.follower FOLDER DESCRIPTOR PARENT` reads FOLDER/follow.json; its place among
the ranks stands in its environment. It writes nothing but what stderr gets. PARENT is the process to live no
longer than. Where the leader is on another machine, the command that was started here follows itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from engines.errors import InfeasiblePlan, NonFiniteLoss, NotAvailable, PeerLost, UserError
from engines.files.locks import own_folder
from engines.files.reading import exists
from engines.transfer.process_group import leave
from engines.world import World
from harness.data.batches import make_data
from harness.progress import Progress
from harness.records.job import Job, Limits
from harness.resolve import resolve_shape
from harness.runs.processes import Group
from harness.runs.ranks import RankPlace, check_gpus, place_of, places
from harness.runs.worker import end_with_parent
from harness.training import restore
from harness.training.leader import FOLLOW, MODULE, Following, check_same_weights, met, who_ended
from harness.training.led_engine import END, STATE, STEP, obey
from harness.training.run_folder import method_of
from harness.training.train import set_up, user_errors
from harness.training.update_log import decode
from profiles.documents import to_json, write_whole


def main(arguments: Sequence[str]) -> int:
    end_with_parent(int(arguments[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that leads ends the run
    following = TypeAdapter(Following).validate_json((Path(arguments[0]) / FOLLOW).read_bytes())
    try:
        follow(following, place_of(os.environ), Progress(quiet=True))
    except (UserError, NotAvailable, InfeasiblePlan, NonFiniteLoss, PeerLost) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def leads(limits: Limits) -> bool:
    """Whether the ranks of a run are led from this machine. Raises `UserError` for a wrong NODE_RANK."""
    ranks = places(limits, Path())
    return not ranks or ranks[0].rank == 0


def follow_from_here(job: Job, engine_name: str, settings: Any, progress: Progress) -> int:
    """All ranks of this machine follow, the first in this process; how many steps are done then.

    Raises `UserError` where the ranks do not meet or are unlike, or one is gone before the run is done.
    """
    check_gpus(job.limits, [engine_name])
    following = Following(job=job, method=method_of(engine_name, settings))
    with own_folder() as work:
        ranks = places(job.limits, work)
        write_whole(work / FOLLOW, to_json(following))
        others = Group(work, ranks[1:], None, MODULE) if ranks[1:] else None
        try:
            with user_errors(engine_name, job, None):
                return follow(following, ranks[0], progress)
        except PeerLost:
            raise who_ended(others, work, "start it again on every machine, there with --resume") from None
        finally:
            leave()
            if others is not None:
                others.finish({})


def follow(following: Following, place: RankPlace, progress: Progress) -> int:
    """Take every step that the leader takes; how many steps are done then."""
    job, method = following.job, following.method
    settings: Any = method.settings.typed
    world = met(place, job, method.engine, settings)
    shape = resolve_shape(job)
    data = make_data(job, shape)
    sample = data.step_batches(0)[0]
    with set_up(job, shape, method.engine, settings, progress, None, sample, world) as (engine, blueprint):
        check_same_weights(world, engine, len(blueprint.parameter_shapes), progress)
        step = 0
        while (order := world.broadcast(b"")) != END:
            if order == STATE:
                step = _catch_up(engine, world)
            elif order == STEP:
                engine.step(data.step_batches(step))
                step += 1
            else:
                obey(engine, order, data.evaluation)
    return step


def _catch_up(engine: Any, world: World) -> int:
    """Bring `engine` to where the leader is; how many steps are done. Raises `UserError`."""
    state = json.loads(world.broadcast(b""))
    log = world.broadcast(b"")
    name, step = f"rank {world.rank}", 0
    if state["checkpoint"] is not None:
        checkpoint = Path(state["checkpoint"])
        if not exists(checkpoint):
            raise UserError(
                name, f"does not see {checkpoint}", "name an --out that every machine sees, at the same place"
            )
        engine.load(checkpoint)
        step = restore.step_of(checkpoint)
    contents = decode(log, "the update log") if log else None
    if contents is not None and contents.end_step > step:
        engine.replay(contents.updates(step))
        engine.synchronize()
    world.barrier()
    return int(state["done"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
