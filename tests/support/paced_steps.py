"""Steps of zo2 on one machine, alone or with another, with a link that makes a step last a while whatever the
processor is busy with.

    python tests/support/paced_steps.py RANK SIZE WHERE STEPS

Prints JSON: seconds of each step, and the losses. Every machine takes one micro-batch a step; alone, machine
RANK takes those that it has in a run of two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402

from engines.base import Context, LinkRates  # noqa: E402
from engines.methods.zo2 import Zo2  # noqa: E402
from engines.settings.zeroth_order import Zo2Settings  # noqa: E402
from engines.shapes import Workload  # noqa: E402
from engines.transfer.clock import now_s  # noqa: E402
from engines.transfer.process_group import leave, meet  # noqa: E402
from engines.world import ALONE, World  # noqa: E402
from tiny_models import tiny_batches, tiny_blueprint  # noqa: E402

BYTES_PER_S = 36e3
"""A step then takes 1.1 s, as that of a model of 30 billion parameters does at 55 GB/s."""
WARMUP = 2


def main(rank: int, size: int, where: str, steps: int) -> None:
    torch.set_num_threads(1)
    world: World = ALONE if size == 1 else meet(where, rank, size, 0, 1)
    workload = Workload(batch_size=1, seq_len=16, dtype="fp32", accumulation=size)
    rates = LinkRates(h2d_bytes_per_s=BYTES_PER_S, d2h_bytes_per_s=BYTES_PER_S)
    where_to = Context(
        device="cpu", workload=workload, seed=0, total_steps=steps, world=world, link_rates=rates
    )
    engine = Zo2(Zo2Settings(learning_rate=1e-5, fold_every=64), where_to)
    engine.setup(tiny_blueprint("opt", num_blocks=4))
    batches = tiny_batches(2 * (WARMUP + steps), "opt")
    times_s, losses = [], []
    for step in range(WARMUP + steps):
        pair = batches[2 * step : 2 * step + 2]
        began_s = now_s()
        stats = engine.step(pair if size == 2 else pair[rank : rank + 1])
        times_s.append(now_s() - began_s)
        losses.append(stats.loss)
    engine.close()
    leave()
    print(json.dumps({"times_s": times_s[WARMUP:], "losses": losses}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
