"""Several processes against one, on GPUs: losses, updates and weights after some steps, bit for bit.

    python tests/studies/several_gpus.py --ranks 1,2 --model opt-1.3b --steps 100 --out FILE.json

A process for each rank and GPU. Copies and reads from disk are held up at random, on every rank in another
way, so that one that nobody waited for would show. Prints a row for each method and number of ranks, and ends
with 1 where two of a method differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

METHODS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "zo2": {"fold_every": 1},
    "zo2, fold_every 4": {"fold_every": 4},
    "zo2, sharded": {"fold_every": 2, "sharded_upload": True},
    "zo2, 2 queries": {"fold_every": 2, "queries": 2},
    "zo2, on disk": {"fold_every": 2, "disk_blocks": 3},
    "zo2, on disk, window": {"estimator": "lozo", "lozo_window": 10, "disk_blocks": 3},
}
FIRST_ORDER: dict[str, dict[str, Any]] = {
    "exact-offload": {"learning_rate": 1e-4},
    "exact-offload, streamed": {"learning_rate": 1e-4, "weights": "streamed", "moments": "int8"},
    "lsp": {"learning_rate": 1e-4, "check_every": 5},
}
"""By name only: with a micro-batch for each of the most ranks (--accumulation), lsp in fp32, whose sums over
micro-batches one process does not round."""
MOST_CYCLES = 20_000_000
"""Of the GPU's clock, for which a copy is held up at most: about 10 ms."""


def take_steps(
    rank: int, size: int, arguments: argparse.Namespace, method: str, where: str
) -> dict[str, Any]:
    """On one rank: what the losses, updates and weights come to, and the time of a step."""
    import torch

    from engines import load_engine
    from engines.base import Context
    from engines.settings.parse import parse_settings
    from engines.transfer.clock import now_s
    from engines.transfer.link import Link
    from engines.transfer.process_group import leave, meet
    from engines.world import ALONE, World
    from harness.data.batches import make_data
    from harness.models.blueprint import make_blueprint
    from harness.records.job import DataSource, Job, ModelSource
    from harness.resolve import resolve_shape

    world: World = ALONE if size == 1 else meet(where, rank, size, rank, size)
    job = Job(
        model=ModelSource(name=arguments.model, random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=arguments.seq_len,
        accumulation=arguments.accumulation,
        dtype=arguments.dtype,
        steps=arguments.steps,
        warmup_steps=0,
    )
    engine_name = method.partition(",")[0]
    engine_class = load_engine(engine_name)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    drawn = random.Random(rank)
    if device != "cpu" and hasattr(engine_class, "link_delay"):
        engine_class.link_delay = staticmethod(
            lambda: drawn.randrange(MOST_CYCLES) if drawn.random() < 0.1 else 0
        )
    if hasattr(engine_class, "disk_delay_s"):
        engine_class.disk_delay_s = staticmethod(lambda: drawn.choice((0.0, 0.0, 0.005)))
    settings = parse_settings(engine_name, {"learning_rate": 1e-6, **(METHODS | FIRST_ORDER)[method]})
    context = Context(device=device, workload=job.workload, seed=0, total_steps=arguments.steps, world=world)
    engine = engine_class(settings, context)
    if device != "cpu" and method in FIRST_ORDER:
        torch.set_num_threads(max(2, len(os.sched_getaffinity(0)) // size))
        engine.link = Link(engine.device, lambda: drawn.randrange(MOST_CYCLES) if drawn.random() < 0.1 else 0)
    data = make_data(job, resolve_shape(job))
    blueprint = make_blueprint(job, resolve_shape(job), data.step_batches(0)[0])
    engine.setup(blueprint)
    blueprint.release()
    told, began_s = [], now_s()
    for step in range(arguments.steps):
        stats = engine.step(data.step_batches(step))
        told.append((stats.loss, [update.projected_gradient for update in stats.updates]))
    engine.synchronize()
    step_s = (now_s() - began_s) / arguments.steps
    weights = hashlib.sha256()
    for name, weight in engine.weights():
        weights.update(name.encode())
        weights.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    pinned_bytes = engine.pinned_bytes
    engine.close()
    leave()
    losses = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return {
        "losses": losses, "weights": weights.hexdigest()[:16], "last_loss": told[-1][0], "step_s": step_s,
        "pinned_bytes": pinned_bytes,
    }  # fmt: skip


def in_process(
    rank: int, size: int, arguments: argparse.Namespace, method: str, where: str, out: Path
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "CUDA_VISIBLE_DEVICES": str(rank % arguments.gpus),
    }
    found = take_steps(rank, size, arguments, method, where)
    (out / f"{rank}.json").write_text(json.dumps(found))


def run(size: int, arguments: argparse.Namespace, method: str) -> list[dict[str, Any]]:
    """What every rank found. Raises `RuntimeError` where one failed."""
    from multiprocessing import get_context

    spawned = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        where = f"file://{out}/ranks"
        ranks = [
            spawned.Process(target=in_process, args=(rank, size, arguments, method, where, out))
            for rank in range(size)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(arguments.timeout)
        for each in ranks:
            each.kill()
        if any(each.exitcode for each in ranks):
            raise RuntimeError(f"{method}, {size} ranks: exit codes {[each.exitcode for each in ranks]}")
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs that ranks are laid on, in turn")
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for method in arguments.methods.split(";"):
        for size in map(int, arguments.ranks.split(",")):
            for rank, found in enumerate(run(size, arguments, method)):
                rows.append({"method": method, "ranks": size, "rank": rank, **found})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    bad = 0
    for method in arguments.methods.split(";"):
        ends = {(row["losses"], row["weights"]) for row in rows if row["method"] == method}
        print(f"{method}: {'bit-equal' if len(ends) == 1 else 'DIFFERENT'} at {arguments.ranks} ranks")
        bad += len(ends) != 1
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
