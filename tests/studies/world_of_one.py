"""What it costs one process that steps can be divided among several: steps of two commits, in pairs.

    python tests/studies/world_of_one.py --before c8c1f0a --after cc3aaeb --methods mezo,zo2 --pairs 8

Processes of the two commits take turns, each the same steps of the same job. Prints, for each method, the
ratio of the time of a step after to that before, by the median over the pairs of processes of the ratio of
their median steps, with the bootstrap's interval, and that of their fastest steps, which a busy machine
disturbs least; of wall time, and of processor time, which does not count what else runs there. And what no
machine disturbs: of a step the operations of torch, and the calls of functions, Python's and C's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPEATS = 2000

SETTINGS: dict[str, dict[str, Any]] = {
    "mezo": {"learning_rate": 1e-6},
    "zo2": {"learning_rate": 1e-6, "resident_blocks": 0},
    "exact-offload": {"learning_rate": 1e-5},
    "lsp": {"learning_rate": 1e-5, "check_every": 1000},
    "lora": {"learning_rate": 1e-5},
    "native": {"learning_rate": 1e-5},
}


def take_steps(arguments: argparse.Namespace, method: str) -> dict[str, list[float]]:
    """By the code of the working directory: seconds of each step, in wall time and in processor time."""
    sys.path.insert(0, os.getcwd())
    import time

    import torch

    from engines import load_engine
    from engines.base import Context
    from engines.settings.parse import parse_settings
    from harness.data.batches import make_data
    from harness.models.blueprint import make_blueprint
    from harness.records.job import DataSource, Job, ModelSource
    from harness.resolve import resolve_shape

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    job = Job(
        model=ModelSource(name=arguments.model, random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=arguments.seq_len,
        accumulation=2,
        dtype=arguments.dtype,
        steps=arguments.steps,
        warmup_steps=0,
    )
    context = Context(device=device, workload=job.workload, seed=0, total_steps=arguments.steps)
    engine = load_engine(method)(parse_settings(method, SETTINGS[method]), context)
    data = make_data(job, resolve_shape(job))
    engine.setup(make_blueprint(job, resolve_shape(job), data.step_batches(0)[0]))
    wall_s, cpu_s = [], []
    for step in range(arguments.warmup + arguments.steps):
        batches = data.step_batches(step)
        began, began_cpu = time.perf_counter(), time.process_time()
        engine.step(batches)
        wall_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - began_cpu)
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    batches = data.step_batches(arguments.warmup + arguments.steps)
    sys.setprofile(count)
    engine.step(batches)
    sys.setprofile(None)
    batches = data.step_batches(arguments.warmup + arguments.steps + 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.step(batches)
    operations = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
    engine.close()
    return {
        "wall": wall_s[arguments.warmup :],
        "processor": cpu_s[arguments.warmup :],
        "calls": [float(calls[0])],
        "operations": [float(operations)],
    }


def in_process(folder: Path, method: str, argv: Sequence[str]) -> dict[str, list[float]]:
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *argv, "--take", method]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of their median, 95 %."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(REPEATS))
    return medians[int(0.025 * REPEATS)], medians[int(0.975 * REPEATS)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before")
    parser.add_argument("--after", default="HEAD")
    parser.add_argument("--methods", default="mezo,zo2")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--model", default="tiny-opt")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--take")
    arguments = parser.parse_args(argv)
    if arguments.take:
        print(json.dumps(take_steps(arguments, arguments.take)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("before", "after")]
        for folder, commit in zip(folders, (arguments.before, arguments.after), strict=True):
            add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-f", str(folder), commit]
            subprocess.run(add, check=True, capture_output=True)
        try:
            for method in arguments.methods.split(","):
                ratios: dict[str, list[float]] = {"wall": [], "processor": []}
                least: dict[str, list[list[float]]] = {kind: [[], []] for kind in ratios}
                for pair in range(arguments.pairs):
                    turns = (0, 1) if pair % 2 == 0 else (1, 0)
                    took = {turn: in_process(folders[turn], method, argv) for turn in turns}
                    for kind, values in ratios.items():
                        values.append(statistics.median(took[1][kind]) / statistics.median(took[0][kind]))
                        for turn in turns:
                            least[kind][turn].append(min(took[turn][kind]))
                for kind, values in ratios.items():
                    low, high = interval(values)
                    print(
                        f"{method}: {kind} time after / before {statistics.median(values):.4f} "
                        f"({low:.4f} to {high:.4f}, {arguments.pairs} pairs of {arguments.steps} steps), "
                        f"fastest step {min(least[kind][1]) * 1e3:.3f} / {min(least[kind][0]) * 1e3:.3f} ms, "
                        f"{min(least[kind][1]) / min(least[kind][0]):.4f}",
                        flush=True,
                    )
                for kind in ("operations", "calls"):
                    print(f"{method}: {kind} of a step {took[1][kind][0]:.0f}, before {took[0][kind][0]:.0f}")
        finally:
            for folder in folders:
                remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)]
                subprocess.run(remove, capture_output=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
