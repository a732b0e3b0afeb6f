"""T*: tokens per step from which an update on the CPU hides behind the GPU, measured in one set-up.

    python tests/studies/crossover.py --model deepseek-coder-1.3b --accumulation 1,2,4,8 --profile FILE
    python tests/studies/crossover.py --records reports/results/deepseek-coder-1.3b-*-tokens-exact-offload_*

Takes steps of one engine with so many micro-batches each. Below T* the CPU decides and a step takes the same
time however many tokens it has, C, that of the shortest; above it the GPU does, g seconds for each token,
those of the longest. T* = C / g. With `--profile` it stands beside what a plan for that machine predicts.

With `--records` no step is taken: the steps are those of published folders, one for each number of tokens,
and the plan beside them is that of the longest one's machine, with its settings.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from engines.errors import UserError  # noqa: E402
from engines.settings.parse import parse_settings  # noqa: E402
from engines.shapes import Workload  # noqa: E402
from harness.records.job import Job, ModelSource  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from profiles.machine import load_machine  # noqa: E402
from profiles.planning.budget import budget_of  # noqa: E402
from profiles.planning.context import PlanningContext  # noqa: E402
from profiles.planning.crossover import hidden_above_tokens  # noqa: E402
from reports.load import load_folder  # noqa: E402

RESULTS = ROOT / "reports" / "results"

HIDDEN = 1.05
"""The CPU counts as hidden where a step takes no longer than this times the GPU's own work."""


BUSY = 0.6
"""The CPU decides a step of which its update takes this share at least; the rest is what its first and last
block wait for. Else a step that does not grow with its tokens is one of many small kernels."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Median seconds of the steps of one length: whole, and what GPU and CPU are busy in them; `None`: not
    measured."""

    step_s: float
    gpu_s: float | None
    cpu_s: float | None

    @property
    def hides(self) -> bool:
        return self.gpu_s is not None and self.step_s <= HIDDEN * self.gpu_s


def crossover(timed: Mapping[int, Timed]) -> float | None:
    """T* of steps by their tokens. `None` where the CPU hides in the shortest already or is idle for most of
    it, or does not hide in the longest."""
    many = max(timed)
    shortest, longest = timed[min(timed)], timed[many]
    if shortest.hides or not longest.hides:
        return None
    if shortest.cpu_s is None or shortest.cpu_s < BUSY * shortest.step_s:
        return None
    return shortest.step_s / (longest.step_s / many)


def of_records(folders: Sequence[Path], engine: str) -> tuple[dict[int, Timed], Path]:
    """Steps of `engine` in published folders by their tokens, over the processes, and the longest one's
    folder. Raises `UserError` as `load_folder` does, where two have as many tokens, and where one has no
    such run."""
    found: dict[int, tuple[Timed, Path]] = {}
    for folder in folders:
        loaded = load_folder(folder)
        runs = [run for run in loaded.runs if (run.engine, run.end_state) == (engine, "ok")]
        tokens = loaded.job.workload.tokens_per_step
        if not runs or tokens in found:
            why = f"has {tokens} tokens a step, as another has" if runs else f"has no run of {engine}"
            raise UserError(str(folder), why, "name one folder for each number of tokens")
        taken = [(run.summary.step_s_median, run.summary.gpu_s, run.summary.cpu_s) for run in runs]
        step, gpu, cpu = ([value for value in each if value is not None] for each in zip(*taken, strict=True))
        found[tokens] = timed_of(step, gpu, cpu), folder
    return {tokens: each for tokens, (each, _) in found.items()}, found[max(found)][1]


def timed_of(step: Sequence[float], gpu: Sequence[float], cpu: Sequence[float]) -> Timed:
    """Medians."""
    gpu_s, cpu_s = (statistics.median(each) if each else None for each in (gpu, cpu))
    return Timed(step_s=statistics.median(step), gpu_s=gpu_s, cpu_s=cpu_s)


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
    given = dict(each.split("=", 1) for each in arguments.set)
    workload = Workload(batch_size=arguments.batch_size, seq_len=arguments.seq_len, dtype="bf16")
    job = Job(model=ModelSource(name=arguments.model, random_weights=True))
    settings = parse_settings(arguments.engine, given)
    return _planned(arguments.engine, job, workload, arguments.profile, settings)


def predicted_of(folder: Path, engine: str) -> float | None:
    """The same for the machine, the job and the settings of a published folder."""
    loaded = load_folder(folder)
    settings = next(run.plan.settings.typed for run in loaded.runs if run.engine == engine)
    return _planned(engine, loaded.job, loaded.job.workload, folder / "machine.json", settings)


def _planned(engine: str, job: Job, workload: Workload, profile: Path, settings: Any) -> float | None:
    machine = load_machine(profile)
    context = PlanningContext(
        engine=engine,
        machine=machine,
        shape=resolve_shape(job),
        workload=workload,
        budget=budget_of(machine, None, None, None),
    )
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
    parser.add_argument("--records", nargs="+", type=Path, help="published folders, in place of steps")
    arguments = parser.parse_args(argv)
    if arguments.records:
        timed, longest = of_records(arguments.records, arguments.engine)
        for tokens in sorted(timed):
            print(told(tokens, timed[tokens]))
        tell("measured", crossover(timed))
        tell("predicted", predicted_of(longest, arguments.engine))
        return 0
    counts = sorted(map(int, arguments.accumulation.split(",")))
    of_a_batch = arguments.batch_size * arguments.seq_len
    timed = {}
    for count, steps in take_steps(arguments, counts).items():
        step, gpu, cpu = ([value for value in each if value is not None] for each in zip(*steps, strict=True))
        timed[count * of_a_batch] = timed_of(step, gpu, cpu)
        print(told(count * of_a_batch, timed[count * of_a_batch]), flush=True)
    tell("measured", crossover(timed))
    if arguments.profile is not None:
        tell("predicted", predicted(arguments))
    return 0


def told(tokens: int, timed: Timed) -> str:
    gpu, cpu = (
        "not measured" if each is None else f"{1e3 * each:.1f}" for each in (timed.gpu_s, timed.cpu_s)
    )
    hides = "hidden" if timed.hides else "not hidden"
    return f"{tokens} tokens: {1e3 * timed.step_s:.1f} ms; gpu, cpu: {gpu}, {cpu}; {hides}"


def tell(how: str, tokens: float | None) -> None:
    print(f"T* {how}: {'not found' if tokens is None else f'{tokens:,.0f} tokens'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
