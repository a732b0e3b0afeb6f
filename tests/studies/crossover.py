"""T*: tokens per step from which an update on the CPU hides behind the GPU, measured in one set-up.

    python tests/studies/crossover.py --model deepseek-coder-1.3b --accumulation 1,2,4,8 --profile FILE

Takes steps of one engine with so many micro-batches each. Below T* the CPU decides and a step takes the same
time however many tokens it has, C; above it the GPU does, g seconds for each token, from the two longest
steps. T* = C / g. With `--profile` it stands beside what a plan for that machine predicts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

HIDDEN = 1.05
"""The CPU counts as hidden where a step takes no longer than this times the GPU's own work."""


BUSY = 0.6
"""The CPU decides a step of which its update takes this share at least; the rest is what its first and last
block wait for. Else a step that does not grow with its tokens is one of many small kernels."""


def crossover(step_s: Mapping[int, float], cpu_s: float | None) -> float | None:
    """T* of median seconds by tokens per step, and the CPU's of the shortest; `None` where that is not the
    CPU's: two steps of other lengths that take as long, the longest ones that grow less than the line through
    zero, or a CPU that is idle for most of it."""
    tokens = sorted(step_s)
    if len(tokens) < 3 or cpu_s is None or cpu_s < BUSY * step_s[tokens[0]]:
        return None
    slope = (step_s[tokens[-1]] - step_s[tokens[-2]]) / (tokens[-1] - tokens[-2])
    if slope <= 0 or step_s[tokens[0]] <= slope * tokens[0]:
        return None
    return step_s[tokens[0]] / slope


def take_steps(arguments: argparse.Namespace, counts: Sequence[int]) -> dict[int, list[list[float | None]]]:
    """By micro-batches: of each step its seconds, and those of GPU and CPU."""
    from cpu_adam import made_engine

    from engines.transfer.clock import now_s

    arguments.accumulation = max(counts)
    engine, data = made_engine(arguments, {}, steps=len(counts) * arguments.steps)
    found: dict[int, list[list[float | None]]] = {}
    step = 0
    for count in counts:
        told: list[list[float | None]] = []
        for _ in range(arguments.steps):
            batches = data.step_batches(step)[:count]
            step += 1
            began_s = now_s()
            stats = engine.step(batches)
            told.append([now_s() - began_s, stats.gpu_s, stats.cpu_s])
        engine.synchronize()
        found[count] = told[arguments.skip :]
    engine.close()
    return found


def predicted(arguments: argparse.Namespace) -> float | None:
    """T* of a plan's own reckoning."""
    from engines.settings.parse import parse_settings
    from engines.shapes import Workload
    from harness.records.job import Job, ModelSource
    from harness.resolve import resolve_shape
    from profiles.machine import load_machine
    from profiles.planning.budget import budget_of
    from profiles.planning.context import PlanningContext
    from profiles.planning.crossover import hidden_above_tokens

    given = dict(each.split("=", 1) for each in arguments.set)
    workload = Workload(batch_size=arguments.batch_size, seq_len=arguments.seq_len, dtype="bf16")
    machine = load_machine(arguments.profile)
    context = PlanningContext(
        engine=arguments.engine,
        machine=machine,
        shape=resolve_shape(Job(model=ModelSource(name=arguments.model, random_weights=True))),
        workload=workload,
        budget=budget_of(machine, None, None, None),
    )
    settings: Any = parse_settings(arguments.engine, given)
    return hidden_above_tokens(context, settings)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="exact-offload")
    parser.add_argument("--model", default="deepseek-coder-1.3b")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--accumulation", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=8, help="for each number of micro-batches")
    parser.add_argument("--skip", type=int, default=3, help="of them that do not count")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args(argv)
    counts = sorted(map(int, arguments.accumulation.split(",")))
    of_a_batch = arguments.batch_size * arguments.seq_len
    step_s: dict[int, float] = {}
    cpu_s: dict[int, float | None] = {}
    for count, told in take_steps(arguments, counts).items():
        step, gpu, cpu = ([value for value in each if value is not None] for each in zip(*told, strict=True))
        tokens = count * of_a_batch
        step_s[tokens] = statistics.median(step)
        cpu_s[tokens] = statistics.median(cpu) if cpu else None
        busy = [f"{1e3 * statistics.median(each):.1f}" if each else "not measured" for each in (gpu, cpu)]
        hides = bool(gpu) and step_s[tokens] <= HIDDEN * statistics.median(gpu)
        print(
            f"{tokens} tokens: {1e3 * step_s[tokens]:.1f} ms; gpu, cpu: {', '.join(busy)}; "
            f"{'hidden' if hides else 'not hidden'}",
            flush=True,
        )
    found = crossover(step_s, cpu_s[min(cpu_s)])
    print(f"T* measured: {'not found at these lengths' if found is None else f'{found:,.0f} tokens'}")
    if arguments.profile is not None:
        told_t = predicted(arguments)
        print(f"T* predicted: {'not known' if told_t is None else f'{told_t:,.0f} tokens'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
