"""What would be predicted today for the runs that are published, beside what they took."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from engines.settings.given import Value
from engines.settings.parse import defaults
from harness.pipeline import plan_job
from harness.records.job import Job, load_job
from harness.records.run import Run, load_run
from harness.resolve import resolve_shape
from profiles.machine import load_machine
from profiles.planning.predict import GPU_MODEL_ERROR

RESULTS = Path(__file__).parents[3] / "reports" / "results"
FIRST = "20261124"
"""Date of the first records of the engines as they are now. Folders called earlier are of engines before."""


def runs(folder: Path) -> list[Run]:
    found = [load_run(path) for path in sorted(folder.glob("runs/*.json"))]
    return [run for run in found if run.end_state == "ok" and run.environment.emulated is None]


FOLDERS = [
    folder
    for folder in sorted(RESULTS.glob("*"))
    if folder.name.rpartition("_")[2] >= FIRST and "-earlier_" not in folder.name and runs(folder)
]


COMPILED_FROM = "20261129"
"""Date of the first records in which blocks are compiled, captured, and recomputed only where they must."""

EAGER: dict[str, dict[str, Value]] = {
    "native": {"compile": False, "graphs": False, "checkpointed_blocks": "all"},
    "lsp": {"compile": False, "checkpointed_blocks": "all"},
}


def as_it_ran(job: Job, date: str) -> Job:
    """The job, with what its engines did before there was a setting for it."""
    if date >= COMPILED_FROM:
        return job
    given = {
        name: job.settings.get(name, defaults(name)).completed(**values) for name, values in EAGER.items()
    }
    return replace(job, settings={**job.settings, **given})


@cache
def ratios(folder: Path) -> dict[str, float]:
    """Predicted over measured, by engine, where the machine's profile has the figures."""
    job, machine = load_job(folder / "job.toml"), load_machine(folder / "machine.json")
    job = as_it_ran(job, folder.name.rpartition("_")[2])
    measured_s = {run.engine: run.summary.step_s_median for run in runs(folder)}
    found = {}
    for plan in plan_job(job, resolve_shape(job), machine, list(measured_s)):
        taken_s, predicted_s = measured_s[plan.engine], plan.prediction.step_s
        if predicted_s is None:
            assert "not in the machine profile" in plan.prediction.basis
        elif taken_s is not None:
            found[plan.engine] = predicted_s / taken_s
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_step_took_what_is_predicted_within_the_error_that_plans_state(folder: Path) -> None:
    for ratio in ratios(folder).values():
        assert 1 / GPU_MODEL_ERROR <= ratio <= GPU_MODEL_ERROR


def test_most_are_within_a_tenth() -> None:
    found = [ratio for folder in FOLDERS for ratio in ratios(folder).values()]
    assert len(found) > 30
    assert sum(0.9 <= ratio <= 1.1 for ratio in found) > 0.7 * len(found)
