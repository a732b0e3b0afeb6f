"""Folders of studies as `compare --target --budget` leaves them, with curves that a test names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import engine_of
from engines.settings.parse import defaults
from engines.shapes import Workload
from harness.quality.documents import (
    MethodTrials,
    StudyPlan,
    StudySizes,
    StudyTrial,
    TrialRecord,
    parse_budget,
    parse_quality_target,
    rate_grid,
    rungs_of,
    save_plan,
    trial_path,
)
from harness.quality.judge import judge_study
from harness.records.job import make_job
from harness.records.learning import Evaluated, LearningOutcome
from profiles.documents import to_json, write_whole
from profiles.machine import save_machine
from reports.studies.read import LoadedStudy
from run_records import make_environment, make_machine

Curve = Sequence[tuple[float, float]]
"""(seconds of steps, value on development data) after the first evaluation, which is before training."""

START = 0.5


def study_plan(
    engines: Sequence[str], *, target: str = "accuracy>=0.9", seeds: int = 3, budget: str = "2h"
) -> StudyPlan:
    job = make_job({"model": {"name": "opt-125m"}, "data": {"train": "reviews.tsv"}, "seq_len": 128}, "test")
    asked = parse_budget(budget)
    return StudyPlan(
        job=job, test="test.tsv", sizes=StudySizes(), target=parse_quality_target(target), budget=asked,
        seeds=tuple(range(seeds)),
        rungs=rungs_of(
            asked, seeds,
            Workload(batch_size=job.batch_size, seq_len=job.seq_len, dtype=job.dtype, checkpointing=False),
        ),
        methods=tuple(
            MethodTrials(
                engine=engine_of(name), variant=name.partition(":")[2], settings=defaults(engine_of(name)),
                fits=True, why_not=None, step_s=0.1, rates=rate_grid(1e-4),
            )
            for name in engines
        ),
    )  # fmt: skip


def trial(plan: StudyPlan, method: str, seed: int, curve: Curve, **changes: Any) -> TrialRecord:
    """A final trial; its value on test data is that of its best evaluation, less a point."""
    metric = plan.target.metric
    values = [(0.0, START), *curve]
    best = max(value for _, value in values)
    found = StudyTrial(
        engine=engine_of(method), variant=method.partition(":")[2], rung=len(plan.rungs) - 1,
        learning_rate=1e-4, seed=seed,
    )  # fmt: skip
    record = TrialRecord(
        id=found.id, engine=found.engine, variant=found.variant, rung=found.rung,
        learning_rate=found.learning_rate, seed=seed,
        end_state="ok", end_reason=None, time=f"2026-11-2{1 + seed}T10:11:00+00:00",
        learned=LearningOutcome(
            evaluations=tuple(
                Evaluated(step=10 * place, train_s=time, metrics={metric: value, "loss": 1.5 - value})
                for place, (time, value) in enumerate(values)
            ),
            test_before={metric: START, "loss": 1.0, "majority_class": 0.55},
            test={metric: best - 0.01, "loss": 0.5, "majority_class": 0.55},
            steps=10 * len(curve),
            train_s=values[-1][0],
            eval_s=3.0,
        ),
        setup_s=2.0, step_s_median=0.1, peak_gpu_reserved_bytes=5 * 2**30, peak_host_bytes=3 * 2**30,
        environment=make_environment(),
    )  # fmt: skip
    return replace(record, **changes)


def read_study(plan: StudyPlan, curves: Mapping[str, Sequence[Curve]]) -> LoadedStudy:
    """As `load_study` reads it, without a folder. `curves`: by method, one for each seed."""
    trials = tuple(
        trial(plan, engine, seed, curve)
        for engine, found in curves.items()
        for seed, curve in zip(plan.seeds, found, strict=False)
    )
    result = judge_study(plan, trials)
    return LoadedStudy(name="study", plan=plan, trials=trials, result=result, machine=None, broken=())


def write_study(folder: Path, plan: StudyPlan, curves: Mapping[str, Sequence[Curve]], **changes: Any) -> Path:
    """`curves`: by method, one for each seed."""
    save_plan(plan, folder)
    save_machine(make_machine(), folder / "machine.json")
    for engine, found in curves.items():
        for seed, curve in zip(plan.seeds, found, strict=False):
            write_trial(folder, trial(plan, engine, seed, curve, **changes))
    return folder


def write_trial(folder: Path, record: TrialRecord) -> Path:
    path = trial_path(folder, record.id)
    write_whole(path, to_json(record))
    return path


def rising(at: float, *, to: float = 0.95, end: float = 100.0) -> Curve:
    """Jumps to `to` at `at` seconds and stays there until `end`."""
    return [(at / 2, START), (at, to), (at * 1.1, to), (end, to)]
