"""What is published in a folder of results: methods of its folders, decoding runs, and which of those that
measure the same thing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from engines.errors import UserError
from engines.settings.parse import defaults
from engines.settings.zeroth_order import MezoSettings
from harness.records.run import Run
from harness.records.stats import ENOUGH_RUNS, SAME_FACTOR, Rounds, Spread, spread, step_statistics
from reports.format import job_in_short, model_title
from reports.load import Broken, Loaded, load_folder
from reports.measured.measurements import NOTHING_LEARNED, Measurements, group
from reports.messages import say

KINDS = ("runs", "generations", "trials")
VARIANTS = (
    "base", "train", "estimator", "noise", "queries", "disk_blocks", "projector", "offload", "schedule_order",
)  # fmt: skip
"""Settings that make another method of an engine."""
CHOSEN = ("d", "resident_blocks", "checkpointed_blocks", "moments", "gpu_blocks")
"""Settings that a plan chooses; one that a job sets itself makes another method."""


class IndexRow(Protocol):
    """A row of the page."""

    @property
    def subject(self) -> tuple[object, ...]:
        """What it measures: a later one of the same takes its place."""

    @property
    def began(self) -> str: ...

    @property
    def step_s(self) -> Spread | None:
        """Over the processes."""

    @property
    def is_told(self) -> bool:
        """Whether a run of it says something of its method, if only that it does not fit."""


IndexRowT = TypeVar("IndexRowT", bound=IndexRow)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One method of one folder."""

    folder: str
    model: str
    job: str
    machine: str
    parameters: int
    engine: str
    variant: str
    """Settings that make another method of the engine, as `--set` takes them; empty: none."""
    traced: bool
    began: str
    """Time of the first run, ISO 8601 in UTC."""
    rounds: Rounds
    all_: Measurements

    @property
    def subject(self) -> tuple[object, ...]:
        return self.model, self.job, self.machine, self.variant, self.engine, self.traced

    @property
    def step_s(self) -> Spread | None:
        return self.rounds.step_s

    @property
    def is_told(self) -> bool:
        return _says_something(self.rounds.runs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """A decoding run and the folder that its record is published in."""

    folder: str
    run: Run

    @property
    def subject(self) -> tuple[object, ...]:
        run = self.run
        length = run.job["seq_len"]
        return run.model.name, self.sequences, length, gpu_or_cpu(run), run.engine, variant(run)

    @property
    def began(self) -> str:
        return self.run.time

    @property
    def step_s(self) -> Spread | None:
        seen_s = self.run.summary.step_s_median
        return spread([] if seen_s is None else [seen_s])

    @property
    def is_told(self) -> bool:
        return _says_something([self.run])

    @property
    def sequences(self) -> int:
        return int(self.run.job["batch_size"])

    @property
    def tokens_per_s(self) -> tuple[float | None, float | None, float | None]:
        """Of all sequences together: in the median step, and in the outer deciles from slow to fast."""
        seen = step_statistics(self.run.samples, self.run.tokens_per_step)
        outer_s = (seen.step_s_p90, seen.step_s_p10)
        slow, fast = (None if step_s is None else self.sequences / step_s for step_s in outer_s)
        return seen.tokens_per_s, slow, fast


def published_folders(folder: Path) -> list[Path]:
    """The subfolders of `folder` that hold records, by name. Raises `UserError` if there is none."""
    found = [
        path for path in sorted(folder.glob("*")) if any(any(path.glob(f"{kind}/*.json")) for kind in KINDS)
    ]
    if not found:
        raise UserError(
            str(folder), "holds no published runs (*/runs/*.json)", "name a folder such as reports/results"
        )
    return found


def published(folder: Path, on_broken: Callable[[Broken], None] = lambda broken: None) -> Iterator[Published]:
    """Every method of one folder, native first. Raises `UserError` as `load_folder` does."""
    loaded = load_folder(folder)
    for broken in loaded.broken:
        on_broken(replace(broken, file=f"{folder.name}/{broken.file}"))
    all_ = group(loaded.runs, loaded.machine)
    for engine in all_.engines:
        rounds = all_.of(engine)
        yield Published(
            folder=folder.name,
            model=model_title(loaded.job.model),
            job=job_in_short(loaded.job),
            machine=_machine(loaded, rounds),
            parameters=rounds.runs[0].model.parameters,
            engine=engine,
            variant=variant(rounds.runs[0]),
            traced=any(run.traced for run in rounds.runs),
            began=min(run.time for run in rounds.runs),
            rounds=rounds,
            all_=all_,
        )


def variant(run: Run) -> str:
    """Those of `VARIANTS` that a run had otherwise than by default, and of `CHOSEN` that its job had set, as
    `--set` takes them; all that was set, where a version that has dropped a setting wrote it."""
    plan, asked = run.plan, run.job.get("settings", {}).get(run.engine, {})
    try:
        settings, usual = plan.settings.typed, defaults(plan.engine).typed
    except UserError:
        return ", ".join(f"{name}={value}" for name, value in plan.settings.items())
    names = [name for name in VARIANTS if getattr(settings, name, None) != getattr(usual, name, None)]
    if isinstance(settings, MezoSettings) and settings.trains_quantized:
        names.append("fold_every")
    names += [name for name in CHOSEN if name in asked and name not in names]
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def _says_something(runs: Iterable[Run]) -> bool:
    return any(run.end_state not in NOTHING_LEARNED for run in runs)


def newest(found: Sequence[IndexRowT]) -> list[IndexRowT]:
    """Of those that measure the same, the latest, but before one that was stopped from outside an earlier one
    that was not, and before a single process one of several that it repeats. In the order of `found`."""
    latest: dict[tuple[object, ...], IndexRowT] = {}
    for each in sorted(found, key=lambda each: (each.is_told, each.began)):
        before = latest.get(each.subject)
        if before is None or not _repeats(each, before):
            latest[each.subject] = each
    return [each for each in found if latest[each.subject] is each]


def _repeats(later: IndexRow, earlier: IndexRow) -> bool:
    """Whether a step took the same time in a single process: that says less than a median of several."""
    mine, other = later.step_s, earlier.step_s
    if mine is None or other is None or mine.count > 1 or other.count < ENOUGH_RUNS:
        return False
    return 1 / SAME_FACTOR <= mine.median / other.median <= SAME_FACTOR


def gpu_or_cpu(run: Run) -> str:
    return run.environment.gpu_name or run.environment.cpu


def _machine(loaded: Loaded, rounds: Rounds) -> str:
    environment = rounds.runs[0].environment
    machine = environment.gpu_name or (loaded.machine.name if loaded.machine else environment.cpu)
    if environment.emulated is None:
        return machine
    return say("index.emulated", machine=machine, emulated=environment.emulated)
