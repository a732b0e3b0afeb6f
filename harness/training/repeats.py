"""Several runs of one job that differ in their seed alone, told together."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from engines.files.reading import exists
from harness.records.job import JOB_FILE
from harness.records.metrics import metrics_text
from harness.training.steps import SUMMARY, TrainingSummary
from profiles.documents import read_document


def started(out: Path) -> bool:
    """Whether a run was begun in `out`, so that it can be resumed."""
    return exists(out / JOB_FILE)


def spread_over(folders: Sequence[Path]) -> Iterator[str]:
    """A line for each metric that all runs have: its median and range. Of those with a best model, its
    metric too. Raises `UserError` for a run without a summary."""
    runs = [
        read_document(each / SUMMARY, TrainingSummary, 1, "summary of a training run") for each in folders
    ]
    shared = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    rows = [(name, name, [run.metrics[name] for run in runs]) for name in shared]
    best = [run.best for run in runs if run.best is not None]
    if len(best) == len(runs):
        rows.append((f"best {best[0].metric}", best[0].metric, [each.value for each in best]))
    for label, name, values in rows:
        middle, least, most = (
            metrics_text({name: value}).removeprefix(name.replace("_", " ")).strip()
            for value in (statistics.median(values), min(values), max(values))
        )
        yield f"{len(runs)} seeds: {label.replace('_', ' ')} {middle} (median; {least} to {most})"
