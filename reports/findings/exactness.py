"""Whether an offloading engine computed what its reference engine did, as far as recorded losses say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines import ENGINES
from engines.errors import UserError
from engines.settings.zeroth_order import MezoSettings
from harness.records.run import Run
from reports.format import number
from reports.measured.measurements import Measurements
from reports.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class LossComparison:
    steps: int
    """That both ran, warm-ups included, over all pairs of runs."""
    differ: int
    """Of them, those whose losses are not the same bits."""
    largest: float
    """Difference of two losses."""


def compare_with_reference(engine: str, reference: str, all_: Measurements) -> LossComparison | None:
    """Losses of every run of `engine` and of the first run of `reference` with the same seed and the same
    settings, but for where things lie. `None`: there are no two such runs of two steps or more; the first
    loss is from before any update."""
    pairs = [
        (mine.loss, other.loss)
        for run, beside in _pairs(engine, reference, all_)
        for mine, other in zip(run.samples, beside.samples, strict=False)
        if min(len(run.samples), len(beside.samples)) > 1
    ]
    if not pairs:
        return None
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return LossComparison(
        steps=len(pairs), differ=sum(a != b for a, b in pairs), largest=max(gaps, default=0.0)
    )


def exact(all_: Measurements) -> str | None:
    """A sentence for each method whose losses are all the same as its reference engine's."""
    sentences = [
        say("twin.exact", engine=engine, twin=reference, steps=found.steps)
        for engine, reference, found in _compared(all_)
        if not found.differ
    ]
    return " ".join(sentences) or None


def inexact(all_: Measurements) -> str | None:
    """A warning for each method of which some are not."""
    sentences = [
        say(
            "warning.inexact", engine=engine, twin=reference, steps=found.steps, differ=found.differ,
            largest=number(found.largest),
        )
        for engine, reference, found in _compared(all_)
        if found.differ
    ]  # fmt: skip
    return " ".join(sentences) or None


def _compared(all_: Measurements) -> Iterator[tuple[str, str, LossComparison]]:
    """Each engine with its reference engine, where both ran alike."""
    for engine, row in ENGINES.items():
        if row.reference is not None:
            found = compare_with_reference(engine, row.reference, all_)
            if found is not None:
                yield engine, row.reference, found


def _pairs(engine: str, reference: str, all_: Measurements) -> Iterator[tuple[Run, Run]]:
    candidates = [run for run in _of(all_, reference) if run.samples]
    for run in _of(all_, engine):
        mine = _computes(run)
        same = (other for other in candidates if _computes(other) == mine is not None)
        if run.samples and (beside := next(same, None)) is not None:
            yield run, beside


def _of(all_: Measurements, engine: str) -> tuple[Run, ...]:
    return all_.of(engine).runs if engine in all_.rounds else ()


def _computes(run: Run) -> tuple[object, ...] | None:
    """What decides the losses of a run, apart from the job; `None` where its settings are not known here."""
    try:
        settings = run.plan.settings.typed
    except UserError:
        return None
    if not isinstance(settings, MezoSettings):
        return None
    return run.job.get("seed"), *settings.decides_updates.items()
