"""Is the method that is predicted to be first also the first to finish? Jobs that several methods ran.

    python tests/studies/first_choices.py draw --seed N --jobs 3 --machine FILE > JOBS.toml
    python tests/studies/prediction_grid.py run --list JOBS.toml --out FOLDER --machine FILE
    python tests/studies/first_choices.py table FOLDER [FOLDER ...] [--as-planned]

`draw` takes jobs by lot (model, batch, tokens, a limit of GPU memory, a link) and looks at whether plans fit,
at no time. Each job goes to every method with gradients that fits, as these are ranked among themselves.
Left out is GaLore, most of whose time is in one step of 200; torchao's and FSDP2's copies are not held to a
link.

`table` reads such folders and those of `compare`. Of each job: who was predicted to be first and who was,
what following the prediction costs (the step of the one over that of the other), whether the quickest was the
first or said to be a tie with it, and, of two methods whose steps differ by more than `ALIKE`, how often the
quicker one was predicted to be. Predictions are today's for the settings that ran, or with `--as-planned`
those of their time. All of that once more without the methods that train adapters, which are the quickest
nearly everywhere.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from engines import ENGINES  # noqa: E402
from harness.models.configs import NAMED_SHAPES, named_shape  # noqa: E402
from harness.records.job import make_job  # noqa: E402
from harness.records.run import Run, load_run  # noqa: E402
from profiles.machine import Machine, load_machine  # noqa: E402
from profiles.planning.predict import predict  # noqa: E402
from tests.studies.prediction_grid import (  # noqa: E402
    BESIDE_OTHERS,
    UNLOCKED_FROM,
    GridCell,
    cost_of,
    planned,
    with_link,
)

ALIKE = 0.1
"""Steps that differ by less are as long as each other: cores and clocks of a host make as much."""
MODELS = (
    "opt-125m", "opt-350m", "opt-1.3b", "gpt2", "gpt2-large", "roberta-base",
    "qwen2.5-0.5b", "qwen2.5-1.5b", "deepseek-coder-1.3b",
)  # fmt: skip
METHODS = (
    "native", "lora", "qlora", "lsp", "exact-offload", "backward-optimizer", "adamw-8bit",
    "torchao-offload", "fsdp2-offload",
)  # fmt: skip
MAKE_COPIES = ("torchao-offload", "fsdp2-offload")
"""Libraries that copy by themselves, at the speed of the machine's link."""
TRAIN_ADAPTERS = ("lora", "qlora")
LEAST_METHODS = 4
MOST_TOKENS = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A method in a job. Seconds of a step."""

    engine: str
    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A job, and the methods with gradients that ran it on one machine."""

    job: str
    methods: tuple[Taken, ...]

    @property
    def predicted(self) -> Taken:
        return min(self.methods, key=lambda each: each.predicted_s)

    @property
    def quickest(self) -> Taken:
        return min(self.methods, key=lambda each: each.measured_s)

    @property
    def costs(self) -> float:
        """Of following the prediction: its step over the quickest one's."""
        return self.predicted.measured_s / self.quickest.measured_s

    @property
    def is_told(self) -> bool:
        """The quickest is the first, or its range overlaps the first one's, which is to be measured then."""
        first, other = self.predicted, self.quickest
        return first is other or (first.low_s <= other.high_s and other.low_s <= first.high_s)

    def without_adapters(self) -> Choice | None:
        """`None`: less than two methods are left."""
        left = tuple(each for each in self.methods if each.engine not in TRAIN_ADAPTERS)
        return replace(self, methods=left) if len(left) > 1 else None

    def pairs(self) -> tuple[int, int]:
        """Of those whose steps differ: in the predicted order, all."""
        order = [
            (one.predicted_s < other.predicted_s) == (one.measured_s < other.measured_s)
            for one, other in combinations(self.methods, 2)
            if max(one.measured_s, other.measured_s) > (1 + ALIKE) * min(one.measured_s, other.measured_s)
        ]
        return sum(order), len(order)


def choices_of(folder: Path, *, as_planned: bool = False) -> list[Choice]:
    """Of all jobs in `folder` that two methods or more ran to their end."""
    machine = load_machine(folder / "machine.json")
    jobs: dict[str, dict[str, list[Run]]] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = load_run(path)
        if counts(record):
            jobs.setdefault(name_of(record), {}).setdefault(record.engine, []).append(record)
    found = []
    for name, engines in jobs.items():
        methods = [taken_of(records, machine, as_planned=as_planned) for records in engines.values()]
        if len(methods) > 1:
            found.append(Choice(job=name, methods=tuple(methods)))
    return found


def counts(record: Run) -> bool:
    """It ran alone and whole, in one process, by a method with gradients as it is today."""
    job = make_job(record.job, record.id)
    is_of_today = record.engine not in ("lsp", "exact-offload") or record.time >= UNLOCKED_FROM
    return (
        record.end_state == "ok"
        and record.summary.step_s_median is not None
        and ENGINES[record.engine].order == "first"
        and BESIDE_OTHERS not in record.environment.notes
        and job.model.name in NAMED_SHAPES
        and job.limits.gpus == 1
        and is_of_today
    )


def name_of(record: Run) -> str:
    """What a job is told by, and the link that it was held to."""
    job = make_job(record.job, record.id)
    told = f"{job.model.name} {job.batch_size} x {job.seq_len}"
    told += f" x {job.accumulation}" if job.accumulation > 1 else ""
    told += "" if job.checkpointing else ", nothing recomputed"
    told += f", {job.limits.vram_bytes / 1e9:g} GB" if job.limits.vram_bytes else ""
    if record.emulation is not None:
        told += f", link of {record.emulation.rates.h2d_bytes_per_s / 1e9:g} GB/s"
    return told


def taken_of(records: Sequence[Run], machine: Machine, *, as_planned: bool) -> Taken:
    """Of one method's records of a job."""
    first = records[0]
    if first.emulation is not None:
        machine = with_link(machine, first.emulation.rates.h2d_bytes_per_s)
    job = make_job(first.job, first.id)
    told = first.plan.prediction if as_planned else predict(cost_of(first, job), machine, job.workload)
    assert told.step_s is not None
    assert told.step_s_low is not None
    assert told.step_s_high is not None
    return Taken(
        engine=first.engine,
        predicted_s=told.step_s,
        low_s=told.step_s_low,
        high_s=told.step_s_high,
        measured_s=median(each.summary.step_s_median or 0.0 for each in records),
    )


def text_of(choices: Sequence[Choice]) -> str:
    """The table, for people and as Markdown."""
    lines = ["| job | ms a step, by time (predicted) | predicted first | without adapters | pairs in order |"]
    lines += ["| --- | --- | --- | --- | ---: |"]
    for choice in choices:
        by_time = sorted(choice.methods, key=lambda each: each.measured_s)
        steps = [
            f"{each.engine} {1e3 * each.measured_s:.3g} ({1e3 * each.predicted_s:.3g})" for each in by_time
        ]
        rest = choice.without_adapters()
        right, pairs = choice.pairs()
        cells = [choice.job, ", ".join(steps), _first(choice), "-" if rest is None else _first(rest)]
        lines.append(f"| {' | '.join(cells)} | {right} of {pairs} |")
    rests = [rest for choice in choices if (rest := choice.without_adapters()) is not None]
    return "\n".join([*lines, "", summary("All methods", choices), summary("Without adapters", rests)])


def _first(choice: Choice) -> str:
    """Who was predicted to be first, and what following that costs."""
    first = choice.predicted.engine
    if choice.predicted is choice.quickest:
        return first
    return f"{first}, {choice.costs:.2f} of {choice.quickest.engine}" + (", a tie" if choice.is_told else "")


def summary(title: str, choices: Sequence[Choice]) -> str:
    """One line."""
    if not choices:
        return f"{title}: no job that two ran"
    right, pairs = (sum(part) for part in zip(*(each.pairs() for each in choices), strict=True))
    exact = sum(each.predicted is each.quickest for each in choices)
    tied = sum(each.is_told for each in choices)
    return (
        f"{title}: the quickest was predicted to be first in {exact} of {len(choices)} jobs, or told to be a "
        f"tie with the first in {tied}; following the prediction costs at most "
        f"{max(each.costs for each in choices):.2f} of the quickest step; of two methods whose steps differ "
        f"by more than {ALIKE:.0%} the quicker one was predicted to be in {right} of {pairs}"
    )


def drawn(seed: int, jobs: int, machine: Machine) -> Iterator[GridCell]:
    """Cells of so many jobs, one after the other."""
    lot = random.Random(seed)
    while jobs > 0:
        model, batch = lot.choice(MODELS), lot.choice([1, 2, 4, 8, 16])
        tokens = lot.choice([128, 256, 512, 1024, 2048, 4096])
        vram = lot.choice([None, None, "4GB", "8GB", "12GB", "16GB"])
        link = lot.choice([None, None, "24GB", "12GB"])
        if tokens > named_shape(model).max_seq_len or batch * tokens > MOST_TOKENS:
            continue
        methods = [each for each in METHODS if link is None or each not in MAKE_COPIES]
        cells = [
            GridCell(
                name=f"{engine}-{model}-{batch}x{tokens}-{vram or 'whole'}-{link or 'own'}".lower(),
                engine=engine, model=model, batch=batch, tokens=tokens, vram=vram, link=link, settings={},
            )
            for engine in methods
        ]  # fmt: skip
        fitting = [cell for cell in cells if planned(cell, machine)[1].fits]
        if len(fitting) >= LEAST_METHODS:
            jobs -= 1
            yield from fitting


def toml_of(cells: Iterable[GridCell]) -> str:
    def lines(cell: GridCell) -> Iterator[str]:
        yield "[[cells]]"
        for key in ("name", "engine", "model", "batch", "tokens", "vram", "link"):
            value = getattr(cell, key)
            if value is not None:
                yield f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"

    return "\n\n".join("\n".join(lines(cell)) for cell in cells) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    draw = commands.add_parser("draw", help="jobs by lot, as a list of cells")
    draw.add_argument("--seed", type=int, required=True)
    draw.add_argument("--jobs", type=int, required=True)
    draw.add_argument("--machine", type=Path, required=True)
    table = commands.add_parser("table", help="who was predicted to be first, and who was")
    table.add_argument("folders", type=Path, nargs="+")
    table.add_argument("--as-planned", action="store_true", help="by the predictions of their time")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        print(toml_of(drawn(arguments.seed, arguments.jobs, load_machine(arguments.machine))), end="")
        return 0
    found = [
        each for folder in arguments.folders for each in choices_of(folder, as_planned=arguments.as_planned)
    ]
    print(text_of(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
