"""Whether an offloading engine computed what its reference engine did, as far as recorded losses say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines.errors import UserError
from engines.settings.parse import parse_recorded
from harness.records.run import Run
from reports.format import number
from reports.messages import say
from reports.metrics import Measurements

ENGINE, REFERENCE = "zo2", "mezo"
"""The one pair whose reference, the same method with nothing offloaded, is an engine of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossComparison:
    steps: int
    """That both ran, warm-ups included, over all pairs of runs."""
    differ: int
    """Of them, those whose losses are not the same bits."""
    largest: float
    """Difference of two losses."""


def compare_with_reference(all_: Measurements) -> LossComparison | None:
    """Losses of every run of `ENGINE` and of the first run of `REFERENCE` with the same seed and the same
    settings, but for where things lie. `None`: there are no two such runs of two steps or more; the first
    loss is from before any update."""
    pairs = [
        (mine.loss, other.loss)
        for run, reference in _pairs(all_)
        for mine, other in zip(run.samples, reference.samples, strict=False)
        if min(len(run.samples), len(reference.samples)) > 1
    ]
    if not pairs:
        return None
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return LossComparison(
        steps=len(pairs), differ=sum(a != b for a, b in pairs), largest=max(gaps, default=0.0)
    )


def exact(all_: Measurements) -> str | None:
    """A sentence, where all losses are the same."""
    found = compare_with_reference(all_)
    if found is None or found.differ:
        return None
    return say("twin.exact", engine=ENGINE, twin=REFERENCE, steps=found.steps)


def inexact(all_: Measurements) -> str | None:
    """A warning, where some are not."""
    found = compare_with_reference(all_)
    if found is None or not found.differ:
        return None
    return say(
        "warning.inexact", engine=ENGINE, twin=REFERENCE, steps=found.steps, differ=found.differ,
        largest=number(found.largest),
    )  # fmt: skip


def _pairs(all_: Measurements) -> Iterator[tuple[Run, Run]]:
    references = [run for run in _of(all_, REFERENCE) if run.samples]
    for run in _of(all_, ENGINE):
        same = (each for each in references if _computes(each) == _computes(run) is not None)
        if run.samples and (reference := next(same, None)) is not None:
            yield run, reference


def _of(all_: Measurements, engine: str) -> tuple[Run, ...]:
    return all_.of(engine).runs if engine in all_.rounds else ()


def _computes(run: Run) -> tuple[object, ...] | None:
    """What decides the losses of a run, apart from the job; `None` where its settings are not known here."""
    try:
        settings = parse_recorded(run.engine, run.plan.settings)
    except UserError:
        return None
    return run.job.get("seed"), *settings.decides_updates.items()
